"""Spoken: channels and recipients become reasoning, content and calls, at once and in any pieces."""

import random

import pytest
from harmony_cases import ids_of
from scripted import save_tokenizer

from epmoe.server.openai.spoken import CALL, CONTENT, REASONING, Spoken
from epmoe.text.harmony import Messages
from epmoe.text.tokenizer import Tokenizer

WHOLE = (
    "<|channel|>analysis<|message|>They ask.<|end|><|start|>assistant<|channel|>analysis<|message|>More.<|end|>"
    "<|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
    '<|start|>assistant<|channel|>commentary to=functions.rain <|constrain|>json<|message|>{"town":"Ulm"}<|end|>'
    "<|start|>assistant<|channel|>commentary to=functions.sun<|message|>{}<|end|>"
    "<|start|>assistant<|channel|>final<|message|>It rains.<|return|>"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


def fed(
    tokenizer: Tokenizer, text: str, *, several: bool = True, alone: bool = False, ask: float = 0.0
) -> tuple[Spoken, list[object]]:
    """What is known after this answer; asked for what is fresh with probability `ask` after each id."""
    prompt = ids_of(tokenizer, "<|start|>user<|message|>Rain?<|end|><|start|>assistant")
    parser = Messages(tokenizer, prompt)
    spoken, found, rng = Spoken(parser, several=several, alone=alone), list[object](), random.Random(text)
    for id in ids_of(tokenizer, text):
        parser.feed(id)
        if rng.random() < ask:
            found += spoken.fresh()
    parser.finish(complete=True)
    return spoken, [*found, *spoken.fresh()]


def test_an_answer_with_all_of_it(tokenizer: Tokenizer) -> None:
    message = fed(tokenizer, WHOLE)[0].message()
    assert message["reasoning"] == message["reasoning_content"] == "They ask.\n\nMore."
    assert message["content"] == "I look.\n\nIt rains."
    assert [each["function"] for each in message["tool_calls"]] == [
        {"name": "rain", "arguments": '{"town":"Ulm"}'},
        {"name": "sun", "arguments": "{}"},
    ]
    first, second = (each["id"] for each in message["tool_calls"])
    assert first != second and first.startswith("call_")


@pytest.mark.parametrize("ask", [0.05, 0.5, 1.0])
def test_pieces_add_up_to_it(tokenizer: Tokenizer, ask: float) -> None:
    spoken, deltas = fed(tokenizer, WHOLE, ask=ask)
    message = spoken.message()
    for kind, text in ((REASONING, message["reasoning"]), (CONTENT, message["content"])):
        assert "".join(each.text for each in deltas if each.kind == kind) == text  # type: ignore[attr-defined]
    calls = [each for each in deltas if each.kind == CALL]  # type: ignore[attr-defined]
    for index, call in enumerate(message["tool_calls"]):
        own = [each for each in calls if each.index == index]  # type: ignore[attr-defined]
        assert "".join(each.text for each in own) == call["function"]["arguments"]  # type: ignore[attr-defined]
        assert [each.id for each in own] == [call["id"]] + [None] * (len(own) - 1)  # type: ignore[attr-defined]
        assert own[0].name == call["function"]["name"]  # type: ignore[attr-defined]


def test_one_call_where_only_one_is_wanted(tokenizer: Tokenizer) -> None:
    for ask in (0.0, 1.0):
        spoken, deltas = fed(tokenizer, WHOLE, several=False, ask=ask)
        assert [each["function"]["name"] for each in spoken.message()["tool_calls"]] == ["rain"]
        assert {each.index for each in deltas if each.kind == CALL} == {0}  # type: ignore[attr-defined]


def test_plain_text_and_nothing(tokenizer: Tokenizer) -> None:
    assert fed(tokenizer, "")[0].message() == {"role": "assistant", "content": "", "refusal": None}
    assert fed(tokenizer, "<|message|>Yes.")[0].message()["content"] == "Yes."
    call = fed(tokenizer, "<|channel|>commentary to=functions.sun<|message|>{<|call|>")[0].message()
    assert call["content"] is None and call["tool_calls"][0]["function"] == {"name": "sun", "arguments": "{"}


def test_a_final_message_whose_form_was_asked_for_is_the_content_alone(tokenizer: Tokenizer) -> None:
    message = fed(tokenizer, WHOLE, alone=True, ask=0.3)[0].message()
    assert message["content"] == "It rains." and message["reasoning"] == "They ask.\n\nMore.\n\nI look."
