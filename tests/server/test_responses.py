"""/v1/responses on real servers that say what they were written to, with OpenAI's client."""

import itertools
import json
import random
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

import openai
import pytest
from conversations import WEATHER
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel
from scripted import scripted
from served import MINUTES, Server, endless, post, served

from epmoe.server.openai.responses import ResponseRequest

CALL = (
    "t", "<|channel|>", "commentary to=functions.weather ", "<|constrain|>", "json", "<|message|>",
    '{"city"', ': "Ul', 'm"}', "<|call|>",
)  # fmt: skip
SAID = ("t", "<|channel|>", "analysis", "<|message|>", "They ask", " for rain.", "<|end|>", "It r", "ains", "!")
TEMPLATE = """\
{%- if tools %}<|start|>developer<|message|>{{ tools[0].function.name }}<|end|>{% endif %}
{%- for message in messages %}<|start|>{{ message.role }}<|message|>{{ message.content }}
{%- if message.thinking %}[{{ message.thinking }}]{% endif %}
{%- for call in message.tool_calls or [] %}{{ call.function.name }}{{ call.function.arguments }}{% endfor %}<|end|>
{%- endfor %}{{ reasoning_effort }}<|start|>assistant"""
WEATHERS: Any = WEATHER["function"]
FUNCTION: Any = {"type": "function", **WEATHERS}
BEGIN = ["response.created", "response.in_progress"]


def strict(kind: Any, value: Any) -> None:
    """Raises where the object is not of this type, or has fields that the type does not name."""
    check_known(kind.model_validate_json(json.dumps(value), strict=True))


def check_known(found: Any) -> None:
    """`store`, and a call's name in its event: OpenAI sends them, and earlier types had the latter."""
    if isinstance(found, BaseModel):
        assert set(found.model_extra or {}) <= {"store", "name"}, (type(found), found.model_extra)
        for name in type(found).model_fields:
            check_known(getattr(found, name))
    elif isinstance(found, list):
        for each in found:
            check_known(each)


EVENTS: dict[str, type[BaseModel]] = {
    get_args(kind.model_fields["type"].annotation)[0]: kind for kind in get_args(get_args(ResponseStreamEvent)[0])
}


def streamed(server: Server, **asked: Any) -> list[dict[str, Any]]:
    """The events of a response."""
    status, text, headers = server.ask("/v1/responses", {"input": "Rain?", **asked, "stream": True})
    assert status == 200 and headers["content-type"].startswith("text/event-stream"), text
    return events_of(text)


def events_of(text: str) -> list[dict[str, Any]]:
    """Each of which is of the type that it names, in the order of their numbers."""
    found = []
    for number, block in enumerate(text.strip().split("\n\n")):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}" and event["sequence_number"] == number
        strict(EVENTS[event["type"]], event)
        found.append(event)
    return found


def kinds(types: Iterable[str]) -> list[str]:
    """Deltas behind each other as one: a busy machine gives larger pieces."""
    return [each for each, _ in itertools.groupby(types)]


def written(folder: Path, chain: tuple[str, ...]) -> Path:
    path = scripted(folder / "checkpoint", chain)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


@pytest.fixture(scope="module")
def calling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("calling")
    with served(folder / "run", f"checkpoint={written(folder, CALL)}", "sampling=greedy", forked=True) as one:
        yield one


@pytest.fixture(scope="module")
def saying(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("saying")
    keys = ("sampling=greedy", "serve.responses=3", "max_new_tokens=9")
    with served(folder / "run", f"checkpoint={written(folder, SAID)}", *keys, forked=True) as one:
        yield one


def test_events_of_reasoning_and_of_a_message(saying: Server) -> None:
    events = streamed(saying, metadata={"a": "b"}, user="me", temperature=0)
    assert kinds(each["type"] for each in events) == [
        *BEGIN,
        "response.output_item.added", "response.content_part.added",
        "response.reasoning_text.delta", "response.reasoning_text.done",
        "response.content_part.done", "response.output_item.done",
        "response.output_item.added", "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done", "response.content_part.done", "response.output_item.done",
        "response.incomplete",
    ]  # fmt: skip
    begun, done = events[0]["response"], events[-1]["response"]
    assert begun["status"] == "in_progress" and begun["output"] == [] and begun["usage"] is None
    reasoning, message = done["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "They ask for rain."}]
    assert message["content"][0]["text"] == "It rains!" and message["phase"] == "final_answer"
    assert (reasoning["status"], message["status"]) == ("completed", "incomplete")
    assert done["incomplete_details"] == {"reason": "max_output_tokens"} and done["completed_at"] is None
    assert done["metadata"] == {"a": "b"} and done["user"] == "me" and done["temperature"] == 0
    assert done["usage"]["output_tokens"] == 9 and done["usage"]["output_tokens_details"] == {"reasoning_tokens": 2}
    assert [each["item"] for each in events if each["type"] == "response.output_item.done"] == done["output"]


def test_a_call_at_once_and_as_events(calling: Server) -> None:
    found = calling.client().responses.create(input="Rain?", model=calling.model, tools=[FUNCTION])
    strict(Response, found.model_dump(mode="json", by_alias=True, exclude_unset=True))
    (call,) = found.output
    assert call.type == "function_call" and call.name == "weather" and call.arguments == '{"city": "Ulm"}'
    assert found.status == "completed" and found.completed_at and found.usage and found.usage.output_tokens == 9
    with calling.client().responses.stream(input="Rain?", model=calling.model, tools=[FUNCTION]) as stream:
        types = [each.type for each in stream]
        again = stream.get_final_response().output[0]
    assert kinds(types) == [
        *BEGIN, "response.output_item.added", "response.function_call_arguments.delta",
        "response.function_call_arguments.done", "response.output_item.done", "response.completed",
    ]  # fmt: skip
    assert again.type == "function_call" and again.arguments == call.arguments and again.call_id != call.call_id
    assert kinds(each["type"] for each in streamed(calling, tools=[FUNCTION])) == kinds(types)


def test_the_next_turn(calling: Server) -> None:
    """By the id of the response before, and with the whole conversation: the same prompt."""
    client = calling.client()
    asked: Any = {"model": calling.model, "tools": [FUNCTION], "instructions": "Be brief."}
    first = client.responses.create(input="Rain?", **asked)
    call = first.output[0]
    assert call.type == "function_call"
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": '{"rain": true}'}
    second = client.responses.create(input=[output], previous_response_id=first.id, **asked)
    own: Any = [{"role": "user", "content": "Rain?"}, call.to_dict(), output]
    whole = client.responses.create(input=own, **asked)
    for each in (second, whole):
        assert each.usage and first.usage and each.usage.input_tokens > first.usage.input_tokens + 20
    assert second.usage and whole.usage and second.usage.input_tokens == whole.usage.input_tokens
    assert whole.usage.input_tokens_details.cached_tokens > 0
    third = client.responses.create(input="And?", previous_response_id=second.id, model=calling.model)
    assert third.usage and third.usage.input_tokens > second.usage.input_tokens - len("Be brief.") - 20
    with pytest.raises(openai.BadRequestError, match="no response 'resp_x'") as caught:
        client.responses.create(input="And?", previous_response_id="resp_x", model=calling.model)
    assert caught.value.code == "previous_response_not_found"


def test_what_is_kept(saying: Server) -> None:
    """Three, of which the one that was asked for least recently goes first."""
    client = saying.client()
    made = [client.responses.create(input=f"Rain {number}?", model=saying.model) for number in range(3)]
    assert client.responses.retrieve(made[0].id) == made[0]
    last = client.responses.create(input="Rain?", model=saying.model)
    secret = client.responses.create(input="Rain?", model=saying.model, store=False)
    for gone in (made[1], secret):
        with pytest.raises(openai.NotFoundError, match="no response"):
            client.responses.retrieve(gone.id)
    assert {client.responses.retrieve(each.id).id for each in (made[0], made[2], last)}
    with pytest.raises(openai.BadRequestError, match="background"):
        client.responses.cancel(last.id)
    client.responses.delete(last.id)
    for again in (client.responses.delete, client.responses.cancel):
        with pytest.raises(openai.NotFoundError):
            again(last.id)
    assert saying.ask(f"/v1/responses/{made[0].id}?stream=true")[0] == 400


def test_log_probabilities_of_messages_alone(saying: Server) -> None:
    asked: dict[str, Any] = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    events = streamed(saying, **asked)
    deltas = [each for each in events if each["type"] == "response.output_text.delta"]
    assert all("".join(one["token"] for one in each["logprobs"]) == each["delta"] for each in deltas)
    (part,) = events[-1]["response"]["output"][1]["content"]
    assert [each["token"] for each in part["logprobs"]] == ["It r", "ains", "!"]
    assert all(len(each["top_logprobs"]) == 2 and each["logprob"] <= 0 for each in part["logprobs"])
    (whole,) = saying.ask("/v1/responses", {"input": "Rain?", **asked})[1]["output"][1]["content"]
    assert whole == part


def test_instructions_and_effort_reach_the_template(saying: Server) -> None:
    def tokens(**more: Any) -> int:
        status, found, _ = saying.ask("/v1/responses", {"input": "Rain?", "store": False, **more})
        assert status == 200, found
        count: int = found["usage"]["input_tokens"]
        return count

    plain = tokens()
    assert tokens(reasoning={"effort": "high"}) == plain + 4
    assert tokens(tools=[FUNCTION]) > plain == tokens(tools=[FUNCTION], tool_choice="none")
    assert tokens(instructions="Brief") == plain + len("system") + len("Brief") + 3
    assert tokens(input=[{"role": "user", "content": [{"type": "input_text", "text": "Rain?"}]}]) == plain


REFUSED: list[tuple[dict[str, Any], str | None]] = [
    ({"background": True}, "background"),
    ({"truncation": "auto"}, "truncation"),
    ({"n": 2}, "n"),
    ({"max_tokens": 3}, "max_tokens"),
    ({"include": ["everything"]}, "include"),
    ({"conversation": "c"}, "conversation"),
    ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
    ({"reasoning": {"effort": 3}}, None),
    ({"text": {"verbosity": "low"}}, "text.verbosity"),
    ({"text": {"format": 3}}, "text.format"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"tools": [{"type": "web_search"}]}, "tools"),
    ({"tool_choice": {"type": "web_search"}}, "tool_choice"),
    ({"input": []}, "input"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://x"}]}]}, "input"),
    ({"temperature": -1}, None),
    ({"max_output_tokens": 0}, None),
    ({"metadata": {"a": 1}}, "metadata"),
]


@pytest.mark.parametrize(
    ("body", "param"), REFUSED, ids=[f"{next(iter(body))}-{at}" for at, (body, _) in enumerate(REFUSED)]
)
def test_refused_by_name(saying: Server, body: dict[str, Any], param: str | None) -> None:
    for more in ({}, {"stream": True}):
        status, answer, _ = saying.ask("/v1/responses", {"input": "Rain?", **body, **more})
        assert status == 400 and (param is None or str(answer["error"]["param"]).startswith(param)), answer
        assert "\n" not in answer["error"]["message"]


def test_too_long_and_unknown(saying: Server) -> None:
    status, answer, _ = saying.ask("/v1/responses", {"input": "Rain? " * 20_000})
    assert status == 400 and answer["error"]["code"] == "context_length_exceeded"
    assert answer["error"]["param"] == "input"
    assert saying.ask("/v1/responses", {"input": "a", "model": "else"})[0] == 404
    assert saying.ask("/v1/responses/resp_x")[0] == 404 and saying.ask("/v1/responses")[0] == 405


def test_a_stream_that_cannot_go_on(tmp_path: Path) -> None:
    """Its last event says so, and that is OpenAI's, too. Before that: a server that keeps nothing."""
    keys = endless(tmp_path / "long"), "serve.drain_s=0.5", "serve.responses=0"
    with served(tmp_path / "run", *keys, settled=False) as one:
        made = one.ask("/v1/responses", {"input": "In the days", "max_output_tokens": 2})[1]
        assert made["store"] is False and one.ask(f"/v1/responses/{made['id']}")[0] == 404
        status, answer, _ = one.ask("/v1/responses", {"input": "In the days", "store": True})
        assert status == 400 and answer["error"]["param"] == "store"
        body = {"input": "In the days", "max_output_tokens": MINUTES, "ignore_eos": True, "stream": True}
        said = b""
        with one.raw(post("/v1/responses", body)) as connection:
            while b"output_text.delta" not in said:
                said += connection.recv(1 << 16)
            one.process.send_signal(signal.SIGTERM)
            while piece := connection.recv(1 << 16):
                said += piece
        assert one.process.wait(60) == 0
    lines = [line for line in said.decode().splitlines() if line.startswith(("event: ", "data: "))]
    events = events_of("\n\n".join(f"{first}\n{second}" for first, second in zip(lines[::2], lines[1::2], strict=True)))
    failed = events[-1]["response"]
    assert events[-1]["type"] == "response.failed" and failed["status"] == "failed"
    assert failed["error"]["code"] == "server_error" and "serve.drain_s" in failed["error"]["message"]
    assert failed["output"][0]["content"][0]["text"].startswith(
        "".join(each["delta"] for each in events if each["type"].endswith(".delta"))[:5]
    )


VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 2**70, 1.5, "", "a", [], [1], {}, {"type": "function", "name": "f"}, [{"role": "user"}], [None],
    [{"role": "user", "content": "a"}], {"format": {"type": []}}, {"effort": []}, [FUNCTION], "\u0000", [{"type": []}],
)  # fmt: skip


def test_any_body_is_answered_or_refused(saying: Server) -> None:
    """Random fields with random values: never a 5xx, and the server answers afterwards."""
    rng, names = random.Random(1), [*ResponseRequest.__struct_fields__, "conversation", "prompt"]
    statuses = set()
    for _ in range(200):
        body = {name: rng.choice(VALUES) for name in rng.sample(names, rng.randrange(1, 4))}
        body = {"input": "Rain?", "max_output_tokens": 2, **body}
        status, answer, _ = saying.ask("/v1/responses", body)
        assert 200 <= status < 500, (body, answer)
        statuses.add(status)
    assert statuses >= {200, 400} and saying.ask("/v1/responses", {"input": "a"})[0] == 200
    saying.comes_to_rest()
    assert "Traceback" not in saying.stderr
