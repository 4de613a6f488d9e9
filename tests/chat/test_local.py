"""Local: the answers of `LLM.chat`, with all the room that there is, and what was said before out of the cache."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from epmoe.chat.local import Local
from epmoe.config.compose import parse
from epmoe.config.schema import ChatConfig
from epmoe.engine.call import Call
from epmoe.errors import UserError
from epmoe.server.openai.spoken import Delta

TALE = "It was a fine morning, and the king of the land went out into the field with all his men to see the corn"
KEYS = ("runtime=cpu", "sampling.ignore_eos=true", "runtime.cache_tokens=256")


@pytest.fixture(scope="module")
def local() -> Iterator[Local]:
    found = Local(parse([*KEYS, "max_tokens=24", "system=never used: a conversation brings its own"], ChatConfig))
    yield found
    found.close()


def test_turns_out_of_the_cache(local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second turn computes no whole page of the first; the text is that of the same prompt elsewhere."""
    asked: list[Call] = []
    submit = local.llm.service.submit

    def noted(calls: Sequence[Call]) -> None:
        asked.extend(calls)
        submit(calls)

    monkeypatch.setattr(local.llm.service, "submit", noted)
    said = list[Delta]()
    messages: list[dict[str, Any]] = [{"role": "user", "content": TALE}]
    assert local.answer(messages, said.append) == "length"
    text = "".join(each.text for each in said)
    messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "And then"}]
    assert local.answer(messages, said.append) == "length"
    first, second = (each.listener.result for each in asked)  # type: ignore[attr-defined]
    before = len(asked[0].request.ids)
    assert first.cached_tokens == 0 and len(first.ids) == 24 and second.cached_tokens >= before // 16 * 16
    assert asked[1].request.ids[:before] == asked[0].request.ids


def test_ctrl_c_ends_the_request_and_the_next_one_comes(local: Local) -> None:
    def stop(_: Delta) -> None:
        raise KeyboardInterrupt

    said = list[Delta]()
    with pytest.raises(KeyboardInterrupt):
        local.answer([{"role": "user", "content": TALE}], stop)
    assert local.answer([{"role": "user", "content": TALE}], said.append) == "length" and said
    with pytest.raises(UserError):
        local.answer([{"role": "user", "content": TALE * 1000}], said.append)


def test_all_the_room_that_there_is() -> None:
    found = Local(parse([*KEYS], ChatConfig))
    try:
        request = found.request([{"role": "user", "content": TALE}])
        assert request.params.max_new_tokens == 256 - len(request.ids)
    finally:
        found.close()
