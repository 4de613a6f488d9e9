"""Structured output over HTTP: schemas, patterns, choices and tools, on real servers; ids are `LLM.generate`'s."""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jsonschema
import openai
import pytest
from conversations import TOOLS, WEATHER
from pydantic import BaseModel, Field
from schemas import schema
from scripted import rambling, save_tokenizer
from served import Server, served

from epmoe import LLM, SamplingParams
from epmoe.engine.matcher import MOST_CHARACTERS
from epmoe.engine.request import Request
from epmoe.errors import UserError
from epmoe.server.errors import ApiError
from epmoe.server.openai.chat import ChatRequest
from epmoe.server.openai.fields import typed
from epmoe.server.openai.structured import Structure, form, offer
from epmoe.text.grammar import Tool, answer, of_choice, of_lark, of_regex, of_schema
from epmoe.text.tokenizer import Tokenizer

PROMPT = "The answer is "
USER: Any = [{"role": "user", "content": PROMPT}]
WITH_IDS = {"return_token_ids": True}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with served(tmp_path_factory.mktemp("plain"), forked=True) as one:
        yield one


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(runtime="cpu") as one:
        yield one


def json_schema(number: int) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "any", "strict": bool(number % 2), "schema": schema(number)}}


def chatted(server: Server, number: int) -> tuple[str, str, tuple[int, ...]]:
    """Text, finish reason and ids of an answer by schema `number`; every third one is streamed."""
    client: Any = server.client(timeout=120)
    asked = {"model": server.model, "messages": USER, "max_tokens": 250, "temperature": number % 2, "seed": number}
    found = client.chat.completions.create(
        **asked, response_format=json_schema(number), stream=number % 3 == 0, extra_body=WITH_IDS
    )
    if number % 3:
        (choice,) = found.choices
        return choice.message.content, choice.finish_reason, tuple(choice.model_extra["token_ids"])
    choices = [each.choices[0] for each in found]
    ids = [id for each in choices for id in (each.model_extra or {}).get("token_ids", ())]
    return "".join(each.delta.content or "" for each in choices), choices[-1].finish_reason, tuple(ids)


@pytest.mark.parametrize("numbers", [range(21, 29), pytest.param(range(100), marks=pytest.mark.slow)], ids=len)
def test_json_schemas(server: Server, llm: LLM, numbers: range) -> None:
    """What was not cut is valid; what was says `length`. Ids are those of the same process: of a few a third's."""
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(partial(chatted, server), numbers))
    cut = 0
    for number, (text, reason, _) in zip(numbers, found, strict=True):
        if reason == "length":
            cut += 1
            continue
        assert reason == "stop"
        jsonschema.Draft202012Validator(schema(number)).validate(json.loads(text))
    assert cut <= len(numbers) / 20
    compared = numbers[:: 1 if len(numbers) > 8 else 3]
    params = [
        SamplingParams(
            grammar=answer(llm.tokenizer, (), of_schema(schema(number))),
            temperature=number % 2,
            seed=number,
            max_tokens=250,
        )
        for number in compared
    ]
    for number, expected in zip(compared, llm.chat([USER] * len(params), params), strict=True):
        text, reason, ids = found[numbers.index(number)]
        assert (text, ids, reason == "length") == (expected.text, expected.ids, expected.finish_reason == "length")
    server.comes_to_rest()


class Town(BaseModel):
    name: str = Field(pattern="^[A-Z][a-z]{2,6}$")
    rain: Literal["much", "little", "none"]


class Report(BaseModel):
    towns: list[Town] = Field(min_length=1, max_length=1)
    days: int = Field(ge=0, le=31)
    note: str | None = Field(max_length=5)


def test_openais_client_parses(server: Server) -> None:
    """A pydantic model goes in and comes out: at once, of several answers, in a stream; a cut one is told as such."""
    client = server.client()
    asked: dict[str, Any] = {"model": server.model, "messages": USER, "response_format": Report, "temperature": 1}
    found = client.chat.completions.parse(**asked, seed=3, n=2, max_tokens=300)
    for choice in found.choices:
        assert isinstance(choice.message.parsed, Report) and choice.finish_reason == "stop"
    with client.chat.completions.stream(**asked, seed=3, max_tokens=300) as stream:
        final = stream.get_final_completion().choices[0].message
    assert final.parsed == found.choices[0].message.parsed
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(**asked, max_tokens=4)
    text = client.chat.completions.create(
        model=server.model, messages=USER, response_format={"type": "json_object"}, max_tokens=8
    ).choices[0]
    assert text.finish_reason == "length" and (text.message.content or "").startswith("{")


SMALL = {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{3}$"}, "minItems": 1, "maxItems": 1}
FORMS: dict[str, tuple[Any, Any, str]] = {
    "regex": ("[a-c]{3}-[0-9]{2}", of_regex("[a-c]{3}-[0-9]{2}"), "[a-c]{3}-[0-9]{2}"),
    "choice": (["yes", 'a "no"\n', "ü"], of_choice(["yes", 'a "no"\n', "ü"]), 'yes|a "no"\n|ü'),
    "grammar": ('start: "x" | "y" start', of_lark('start: "x" | "y" start'), "y*x?"),
    "json": (SMALL, of_schema(SMALL), r'\[\s*"[a-z]{3}"\s*\]'),
}


@pytest.mark.parametrize("kind", FORMS)
def test_vllms_fields(server: Server, llm: LLM, kind: str) -> None:
    """In completions and in chat, under both names, for several prompts."""
    value, body, pattern = FORMS[kind]
    params = SamplingParams(grammar=answer(llm.tokenizer, (), body), temperature=1.0, seed=9, max_tokens=200)
    expected = llm.generate([PROMPT, "He said"], params)
    own = {"temperature": 1, "seed": 9, "max_tokens": 200, "return_token_ids": True}
    for field in ({"structured_outputs": {kind: value}}, {f"guided_{kind}": value}):
        status, found, _ = server.ask("/v1/completions", {"prompt": [PROMPT, "He said"], **own, **field})
        assert status == 200, found
        assert [tuple(each["token_ids"]) for each in found["choices"]] == [each.ids for each in expected]
        assert all(re.fullmatch(pattern, each["text"], re.DOTALL) for each in found["choices"])
    status, found, _ = server.ask(
        "/v1/chat/completions", {"messages": USER, **own, "structured_outputs": {kind: value}}
    )
    assert tuple(found["choices"][0]["token_ids"]) == llm.chat(USER, params)[0].ids


SAMPLED: dict[str, Any] = {
    "presence_penalty": {"presence_penalty": -2, "temperature": 1},
    "logit_bias": {"logit_bias": {"91": -100, "71": 5}},  # its first id is 91 without
    "min_tokens": {"min_tokens": 14, "stop_token_ids": [*range(0, 500, 2)]},
}
ALLOWED = {"allowed_token_ids": [70, 71, 72, 73], "ignore_eos": True}
# tests/engine/test_adjust.py has what each of them does
SLOW = {"frequency_penalty": {"frequency_penalty": 2}, "allowed_token_ids": ALLOWED}


@pytest.mark.parametrize("name", [*SAMPLED, *(pytest.param(each, marks=pytest.mark.slow) for each in SLOW)])
def test_what_adjusts_logits(server: Server, llm: LLM, name: str) -> None:
    own = dict(field := {**SAMPLED, **SLOW}[name])
    if "logit_bias" in own:
        own["logit_bias"] = {int(id): value for id, value in own["logit_bias"].items()}
    params = SamplingParams(**{"temperature": 0.0, **own}, seed=2, max_tokens=24)
    plain = SamplingParams(temperature=params.temperature, seed=2, max_tokens=24)
    free, expected = llm.generate([PROMPT] * 2, [plain, params])
    assert expected.ids != free.ids
    body = {**field, "seed": 2, "max_tokens": 24, "return_token_ids": True}
    status, found, _ = server.ask("/v1/completions", {"prompt": PROMPT, **body})
    assert status == 200 and tuple(found["choices"][0]["token_ids"]) == expected.ids, found


def of_format(own: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "any", "schema": own}}}


def nested(depth: int) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        found = {"properties": {"a": found}}
    return found


PLACE = "response_format.json_schema.schema: "
LARGE = {"enum": ["x" * 1000 + str(number) for number in range(140)]}
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "an unknown type": (of_format({"properties": {"a": {"type": "strin"}}}), PLACE, "Invalid type: strin"),
    "what is not known": (of_format({"type": "array", "uniqueItems": True}), PLACE, "uniqueItems"),
    "no target": (of_format({"$ref": "#/$defs/x"}), PLACE, "'/$defs/x' does not exist"),
    "a file": (of_format({"$ref": "file:///etc/passwd"}), PLACE, "does not fetch"),
    "a pattern": (of_format({"type": "string", "pattern": "(a"}), PLACE, "unclosed group"),
    "nothing obeys": (of_format({"type": "integer", "minimum": 3, "maximum": 2}), PLACE, "minimum (3) is greater"),
    "too deep": (of_format(nested(400)), PLACE, "recursion"),
    "itself": (of_format({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}), "", "grammar is refused"),
    "too many": (of_format({"allOf": [{"anyOf": [{"const": n}] * 9} for n in range(9)]}), PLACE, "too large"),
    "too long": (of_format(LARGE), PLACE, str(MOST_CHARACTERS)),
    "no schema": ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format", "no schema"),
    "no format": ({"response_format": {"type": "structural_tag"}}, "response_format: ", "json_schema"),
    "no choice": ({"guided_choice": []}, "guided_choice: ", "nothing to choose"),
    "no grammar": ({"guided_grammar": "start: ("}, "guided_grammar: ", "Expected token"),
    "look-around": ({"structured_outputs": {"regex": "(?=a)"}}, "structured_outputs.regex: ", "look-ahead"),
    "two forms": (
        {"guided_regex": "a", **of_format({})}, "response_format.json_schema.schema and guided_regex", "one of"
    ),
    "another field": ({"structured_outputs": {"structural_tag": "a"}}, "", "structural_tag"),
    "no id": ({"logit_bias": {"a": 1}}, "", "logit_bias"),
    "a large bias": ({"logit_bias": {"1": 101}}, "", "logit_bias"),
    "no such id": ({"logit_bias": {"1000000": 1}}, "", "vocab_size"),
    "no ids": ({"allowed_token_ids": []}, "", "allowed_token_ids"),
    "a large penalty": ({"frequency_penalty": 2.5}, "", "frequency_penalty"),
    "more than all": ({"min_tokens": 9}, "", "min_tokens=9"),
    "at least, and a form": ({"min_tokens": 2, "guided_regex": "a"}, "", "grammar"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(server: Server, case: str) -> None:
    """With the place and the reason, by both endpoints, in a stream, too; the server answers afterwards."""
    body, place, says = REFUSED[case]
    for path, prompt in (("/v1/chat/completions", {"messages": USER}), ("/v1/completions", {"prompt": PROMPT})):
        for stream in (False, True):
            status, found, _ = server.ask(path, {**prompt, "max_tokens": 5, **body, "stream": stream})
            message = found["error"]["message"]
            assert status == 400 and message.startswith(place) and says in message, found
            assert len(message) < 700
    assert server.ask("/v1/completions", {"prompt": PROMPT, "max_tokens": 1})[0] == 200


def test_a_call_cannot_be_without_markup(llm: LLM) -> None:
    """Of the embedded model, whose answers have none; where no call is needed, tools bind nothing."""
    requests = [Request((1, 2), SamplingParams())]
    for choice, bound in (("auto", False), ("required", True), (named("weather"), True)):
        structure = Structure(None, offer(TOOLS, choice, several=False))
        if bound:
            with pytest.raises(UserError, match="harmony's markup: take tool_choice=auto"):
                structure.bind(llm.tokenizer, requests)
        else:
            assert structure.bind(llm.tokenizer, requests) == requests


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def test_which_tools_a_grammar_has() -> None:
    """Those that must be called; those that may be, where one is strict, or one call is all, or there is a form."""
    strict = [*TOOLS, {"type": "function", "function": {"name": "now", "strict": True}}]
    own: Any = {"structured_outputs": {"regex": "a"}}
    cases: list[tuple[Any, Any, bool, dict[str, Any], list[str]]] = [
        (TOOLS, None, True, {}, []),
        (TOOLS, "auto", True, {}, []),
        (TOOLS, "auto", False, {}, ["weather", "clock"]),
        ([], "auto", False, {}, []),
        (strict, "auto", True, {}, ["weather", "clock", "now"]),
        (strict, "none", False, {}, []),
        (TOOLS, "required", True, {}, ["weather", "clock"]),
        (TOOLS, named("clock"), True, {}, ["clock"]),
        (TOOLS, "auto", True, own, ["weather", "clock"]),
        (TOOLS, "none", True, own, []),
    ]
    for tools, choice, several, field, names in cases:
        asked = typed({"tools": tools, "tool_choice": choice, "parallel_tool_calls": several, **field}, ChatRequest)
        structure = Structure(form(asked, None), asked.offer())
        assert [each.name for each in structure.tools] == names and (structure.body is not None) == bool(field)
        assert all(each.parameters["type"] == "object" for each in structure.tools)
    with pytest.raises(ApiError, match=r"^tools\[1\]\.function\.parameters: the grammar is refused \(Unimpl") as caught:
        bad = {"name": "bad", "parameters": {"properties": {"a": {"type": "array", "uniqueItems": True}}}}
        Structure(None, offer([WEATHER, {"type": "function", "function": bad}], "required", several=True))
    assert caught.value.status == 400 and caught.value.param == "tools"


# Calls of tools, on a model with random weights whose thoughts are short, since their end has a bias

TEMPLATE = "{%- if tools %}{{- '<|start|>developer<|message|>' + tools[0].function.name + '<|end|>' }}{%- endif %}"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = rambling(tmp_path_factory.mktemp("harmony") / "checkpoint")
    save_tokenizer(path / "tokenizer.json", {bytes([byte]): byte for byte in (10, *range(32, 127))})  # ASCII alone
    file = path / "chat_template.jinja"
    file.write_text(TEMPLATE + file.read_text())
    return path


@pytest.fixture(scope="module")
def harmony(checkpoint: Path) -> Iterator[Server]:
    with served(checkpoint.parent / "run", f"checkpoint={checkpoint}", forked=True) as one:
        yield one


class Rain(BaseModel):
    """When it rains."""

    town: str = Field(pattern="^[A-Z][a-z]{2,6}$")
    days: int = Field(ge=1, le=9)


class Clock(BaseModel):
    """The time."""


MODELS: Any = {"Rain": Rain, "Clock": Clock}
CALLED: list[Any] = [openai.pydantic_function_tool(each) for each in MODELS.values()]
CHOICES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "required": ({"tool_choice": "required"}, {"Rain", "Clock"}),
    "named": ({"tool_choice": named("Rain")}, {"Rain"}),
    "one alone": ({"tool_choice": "auto", "parallel_tool_calls": False}, {"Rain", "Clock", ""}),
    "strict, and a form": ({"response_format": Town}, {"Rain", "Clock", ""}),
}


@pytest.mark.parametrize("kind", [*sorted({*CHOICES} - {"named"}), pytest.param("named", marks=pytest.mark.slow)])
def test_calls_obey_their_tools(harmony: Server, checkpoint: Path, kind: str) -> None:
    """Parsed by the client; a stream has the same ones; content is a JSON alone where it is to be one."""
    own, allowed = CHOICES[kind]
    client: Any = harmony.client()
    end = Tokenizer(checkpoint / "tokenizer.json").tokenizer.token_to_id("<|end|>")
    asked = {
        "model": harmony.model, "messages": USER, "tools": CALLED, "temperature": 1, "seed": 1, "max_tokens": 300,
        "logit_bias": {str(end): 5}, **own,
    }  # fmt: skip
    found: list[str] = []
    for seed in range(3):
        try:
            (choice,) = client.chat.completions.parse(**{**asked, "seed": seed}).choices
        except openai.LengthFinishReasonError:
            found.append("cut")
            continue
        found.append(judged(choice, kind))
        if seed < 1:
            with client.chat.completions.stream(**{**asked, "seed": seed}) as stream:
                (streamed,) = stream.get_final_completion().choices
            assert judged(streamed, kind) == found[-1]
            assert (streamed.message.content or None) == choice.message.content
            assert [each.function for each in streamed.message.tool_calls or ()] == [
                each.function for each in choice.message.tool_calls or ()
            ]
    assert {*found} - {"cut"} <= allowed and found.count("cut") < 2, found


def judged(choice: Any, kind: str) -> str:
    """The name of the tool that was called; \"\" for a message."""
    if not choice.message.tool_calls:
        assert choice.finish_reason == "stop" and (kind != "strict, and a form" or choice.message.parsed is not None)
        return ""
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls" and type(call.function.parsed_arguments) is MODELS[call.function.name]
    if kind == "strict, and a form":
        assert not choice.message.content
    return str(call.function.name)


def test_a_grammar_that_fails_on_its_way_is_told_as_such(harmony: Server) -> None:
    """No id spells its last letter, which shows when that is due: at once or in a stream, and nobody else minds."""
    body = {"prompt": "a", "max_tokens": 9, "guided_grammar": 'start: /[a-c]{3}/ "\u00e9"'}
    status, found, _ = harmony.ask("/v1/completions", body)
    assert status == 400 and "grammar has failed on the way (" in found["error"]["message"], found
    text = harmony.ask("/v1/completions", {**body, "stream": True})[1]
    assert "grammar has failed on the way (" in text and "[DONE]" not in text
    harmony.comes_to_rest()
    assert harmony.ask("/v1/completions", {"prompt": "a", "max_tokens": 2, "guided_regex": "[a-c]*"})[0] == 200


def test_ids_of_calls_are_those_of_the_same_process(harmony: Server, checkpoint: Path) -> None:
    tools = [Tool("Rain", CALLED[0]["function"]["parameters"]), Tool("Clock", CALLED[1]["function"]["parameters"])]
    with LLM(str(checkpoint), runtime="cpu") as llm:
        end = llm.tokenizer.tokenizer.token_to_id("<|end|>") or 0
        for seed in range(2):
            own: dict[str, Any] = {"temperature": 1, "seed": seed, "max_tokens": 120, "logit_bias": {str(end): 5}}
            body = {"messages": USER, "tools": CALLED, "tool_choice": "required", "return_token_ids": True}
            status, found, _ = harmony.ask("/v1/chat/completions", {**body, **own})
            prompt = llm.tokenizer.encode("<|start|>assistant", special=False)
            params = SamplingParams(
                temperature=1.0, seed=seed, max_tokens=120, logit_bias=((end, 5.0),),
                grammar=answer(llm.tokenizer, prompt, None, tools, "required"),
            )  # fmt: skip
            (expected,) = llm.chat(USER, params, tools=CALLED)
            assert status == 200 and tuple(found["choices"][0]["token_ids"]) == expected.ids


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"response_format": {"type": "json"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": 3}}}, "response_format"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "sometimes", "tools": TOOLS}, "tool_choice"),
        ({"tool_choice": named("sun"), "tools": TOOLS}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools"}, "tools": TOOLS}, "tool_choice"),
    ],
)
def test_refused_before_anything_is_asked(body: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        typed(body, ChatRequest).check()
    assert caught.value.status == 400 and caught.value.param == param
