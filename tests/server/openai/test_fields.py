"""Fields: what is served, accepted or refused; docs/serving.md names them all."""

from pathlib import Path
from typing import Any

import pytest

from epmoe.engine.request import SamplingParams
from epmoe.server.errors import ApiError
from epmoe.server.openai.chat import ChatRequest
from epmoe.server.openai.completions import CompletionRequest
from epmoe.server.openai.fields import ACCEPTED, NEUTRAL, Sampled, StreamOptions, decoded, typed

DOCS = Path(__file__).resolve().parents[3] / "docs" / "serving.md"


def test_null_is_not_given_and_what_changes_nothing_is_taken() -> None:
    body = {"prompt": "a", "seed": None, "user": "me", "metadata": {"a": 1}, "length_penalty": 1.0, "suffix": ""}
    assert typed({name: value for name, value in body.items() if value is not None}, CompletionRequest).prompt == "a"
    assert decoded(b'{"seed": null, "n": 2}') == {"n": 2}


@pytest.mark.parametrize("name", sorted(NEUTRAL))
def test_what_is_not_served_is_refused_by_name(name: str) -> None:
    for value in NEUTRAL[name]:
        typed({name: value}, Sampled)
    with pytest.raises(ApiError, match=name) as caught:
        typed({name: ["something"]}, Sampled)
    assert caught.value.status == 400 and caught.value.param == name and caught.value.code == "unsupported_parameter"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"n": "2"}, "n"),
        ({"temperature": "hot"}, "temperature"),
        ({"stop": 3}, "stop"),
        ({"stop_token_ids": [1, "a"]}, None),
        ({"stream_options": {"include": True}}, "stream_options"),
        ({"stream": 1}, "stream"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"structured_outputs": {"regex": 1}}, "structured_outputs.regex"),
    ],
)
def test_wrong_types_name_their_field(body: dict[str, Any], param: str | None) -> None:
    with pytest.raises(ApiError) as caught:
        typed(body, Sampled)
    assert caught.value.status == 400 and (param is None or caught.value.param == param)


@pytest.mark.parametrize("body", [b"", b"3", b"[]", b"{", b'{"a": 1', b"\xff", b"[" * 10_000, b'{"a": "\\ud800"}'])
def test_bodies_that_are_no_object(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        decoded(body)
    assert caught.value.status == 400


def test_parameters_are_the_requests_then_the_servers() -> None:
    defaults = SamplingParams(temperature=0.7, top_p=0.9, stop=("end",), ignore_eos=True)
    found = typed({"top_p": 0.5, "top_k": -1, "stop": "x", "n": 2}, Sampled).params(defaults, max_new_tokens=3)
    assert found == SamplingParams(
        temperature=0.7, top_p=0.5, top_k=0, stop=("x",), n=2, max_new_tokens=3, ignore_eos=True
    )
    assert typed({}, Sampled).params(defaults).stop == ("end",)
    bound = SamplingParams(grammar="start: /a/", presence_penalty=1.0, logit_bias=((3, 1.0),))
    assert typed({}, Sampled).params(bound) == bound
    given = {"logit_bias": {"7": -1}, "frequency_penalty": 1, "min_tokens": 2, "allowed_token_ids": [1, 7]}
    assert typed(given, Sampled).params(bound) == SamplingParams(
        grammar="start: /a/", presence_penalty=1.0, frequency_penalty=1.0, logit_bias=((7, -1.0),), min_tokens=2,
        allowed_token_ids=(1, 7),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 129}, "n"),
        ({"stop": ["x"] * 65}, "stop"),
        ({"stop": ["x" * 4000, "y" * 97]}, "stop"),
        ({"stop": "x" * 4097}, "stop"),
        ({"n": 2, "allowed_token_ids": [1] * (1 << 17) + [2]}, "allowed_token_ids"),
        ({"stop_token_ids": [1] * ((1 << 18) + 1)}, "stop_token_ids"),
    ],
)
def test_a_request_has_a_size(fields: dict[str, Any], param: str) -> None:
    """What one asks for costs the others time."""
    with pytest.raises(ApiError) as error:
        typed({"prompt": "a", **fields}, CompletionRequest).params(SamplingParams())
    assert (error.value.status, error.value.param) == (400, param) and len(str(error.value)) < 300
    typed({"prompt": "a", "n": 128, "stop": ["x"] * 64, "allowed_token_ids": [1, 2]}, CompletionRequest)


def test_the_document_names_every_field() -> None:
    """Those that are served, accepted and refused; and no others."""
    text = DOCS.read_text()

    def listed(heading: str) -> set[str]:
        section = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
        rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
        return {name.strip(" `") for row in rows for name in row.split(",")}

    served = {*CompletionRequest.__struct_fields__, *ChatRequest.__struct_fields__}
    assert listed("Fields that are served") == served
    assert listed("Fields that change nothing") == ACCEPTED
    assert listed("Fields that are refused") == NEUTRAL.keys()
    assert all(f"`{name}`" in text for name in StreamOptions.__struct_fields__)
