"""Text: chat templates byte for byte as transformers renders them, exact streaming, stop strings at any border."""

import json
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library
from transformers import PreTrainedTokenizerFast

from epmoe.errors import UserError
from epmoe.text.chat import ChatTemplate
from epmoe.text.stream import StopStrings, TextStream
from epmoe.text.tokenizer import Tokenizer
from epmoe.weights.checkpoint import Checkpoint
from epmoe.weights.synthetic import make_checkpoint

SPECIAL = ["<|startoftext|>", "<|return|>", "<|end|>", "<|start|>", "<|channel|>", "<|message|>"]
VOCAB = 320  # without special tokens
TEXT = "naïve Übermut — 東京 is far, Ελλάδα near; 🙂🙃 👩‍👩‍👧 and \u00e9\u0301, \ufffd too. the then there " * 3


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE, some of which end or begin in the middle of a character."""
    tokenizer = Library(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=VOCAB, initial_alphabet=alphabet))
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in SPECIAL])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module")
def tokenizer(file: Path) -> Tokenizer:
    return Tokenizer(file)


# Uses what harmony's template uses: macros with defaults, namespaces, loop controls, tojson, strftime_now, whitespace
# control of both kinds, filters, tests, `loop` variables and optional inputs.
TEMPLATE = """\
{#- a comment that leaves nothing -#}
{%- macro kind(spec, depth=0) -%}
    {%- if spec.type == "array" -%}
        {{- kind(spec["items"], depth + 1) + "[]" -}}
    {%- elif spec.type is iterable and spec.type is not string -%}
        {{- spec.type | join(" | ") -}}
    {%- elif spec.enum is defined -%}
        {{- '"' + spec.enum | join('" | "') + '"' -}}
    {%- else -%}
        {{- spec.type | default("any") -}}
    {%- endif -%}
{%- endmacro -%}
{%- macro signature(tool) %}
// {{ tool.description }}
type {{ tool.name }} = (_: {
    {%- for name, spec in tool.parameters.properties.items() %}
        {{- "\\n" + name + ("" if name in tool.parameters.required else "?") + ": " + kind(spec) }}
        {%- if spec.default is defined %}, // default: {{ spec.default | tojson }}{% endif %}
    {%- endfor %}
}) => any;
{% endmacro %}
{% if reasoning is not defined %}{% set reasoning = "medium" %}{% endif %}
{{- bos_token }}<|start|>system<|message|>Date: {{ strftime_now("%Y-%m-%d") }}
Reasoning: {{ reasoning }}
  {% if tools %}
Tools:
    {% for tool in tools %}
{{ signature(tool) | trim }}
    {% endfor %}
  {% endif %}
<|end|>
{%- set state = namespace(last=-1, calls=0, seen=[]) %}
{%- for message in messages %}
    {%- if message.role == "user" %}{% set state.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages -%}
    {%- if message.role == "noise" %}{% continue %}{% endif %}
    {%- if message.role == "stop" %}{% break %}{% endif %}
    {%- if message.role not in ["system", "user", "assistant", "tool"] %}
        {{- raise_exception("unknown role " + message.role) }}
    {%- endif %}
    {%- if message.tool_calls %}
        {%- set state.calls = state.calls + message.tool_calls | length %}
        {%- for call in message.tool_calls %}
            {{- "<|start|>" + message.role + " to=" + call.name + "<|message|>" + call.arguments | tojson + "<|end|>" }}
        {%- endfor %}
    {%- else %}
        {{- "<|start|>" ~ message.role ~ "<|message|>" ~ message.content ~ "<|end|>" }}
    {%- endif %}
    {%- if loop.last %}{{ "\\n[" ~ state.calls ~ " calls, last question " ~ state.last ~ "]" }}{% endif %}
{%- endfor %}
{% if add_generation_prompt %}
<|start|>assistant
{%- endif -%}
"""

TOOLS = [
    {
        "name": "weather",
        "description": "Where & when <it> rains",
        "parameters": {
            "type": "object",
            "required": ["city"],
            "properties": {
                "city": {"type": "string"},
                "unit": {"type": "string", "enum": ["°C", "°F"], "default": "°C"},
                "days": {"type": ["integer", "null"], "default": {"b": 1, "a": [True, None, 0.5]}},
                "grid": {"type": "array", "items": {"type": "array", "items": {"type": "number"}}},
            },
        },
    }
]
CONVERSATIONS: dict[str, list[dict[str, object]]] = {
    "one question": [{"role": "user", "content": "Why?"}],
    "html and unicode": [{"role": "user", "content": "a < b & 'c' \"d\" 東京 🙂\n\n  indented {{ braces }} {% if %}"}],
    "loop controls": [
        {"role": "noise", "content": "skipped"},
        {"role": "user", "content": "seen"},
        {"role": "stop", "content": ""},
        {"role": "user", "content": "never seen"},
    ],
    "tool calls": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Rain?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"name": "weather", "arguments": {"city": "Zürich", "x": "</b>"}}],
        },
        {"role": "tool", "content": "[1, 2]"},
    ],
    "no messages": [],
}


@pytest.mark.parametrize("case", CONVERSATIONS)
@pytest.mark.parametrize("variables", [{}, {"tools": TOOLS, "reasoning": "high"}], ids=["plain", "tools"])
def test_chat_template_renders_as_in_transformers(file: Path, case: str, variables: dict[str, object]) -> None:
    oracle = PreTrainedTokenizerFast(
        tokenizer_file=str(file), chat_template=TEMPLATE, bos_token=SPECIAL[0], eos_token=SPECIAL[1]
    )
    ours = ChatTemplate(TEMPLATE, {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1]})
    for generate in (True, False):
        expected = oracle.apply_chat_template(
            [CONVERSATIONS[case]] if not CONVERSATIONS[case] else CONVERSATIONS[case],
            tokenize=False,
            add_generation_prompt=generate,
            **variables,
        )
        expected = expected[0] if isinstance(expected, list) else expected
        assert ours.render(CONVERSATIONS[case], add_generation_prompt=generate, **variables) == expected
    assert datetime.now().strftime("%Y") in expected


def test_template_that_refuses_is_a_users_mistake() -> None:
    with pytest.raises(UserError, match="unknown role critic"):
        ChatTemplate(TEMPLATE, {"bos_token": ""}).render([{"role": "critic", "content": ""}])
    with pytest.raises(UserError, match="chat=off"):
        ChatTemplate("{% for %}", {})


ATTACKS = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.append(1) }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
]


@pytest.mark.parametrize("source", ["{{ 1 // 0 }}", "{{ range(10**9) | list }}", "{{ 'x' + 1 }}", "{{ [][0].x }}"])
def test_whatever_a_template_raises_is_one_line(source: str) -> None:
    with pytest.raises(UserError, match="chat template refuses the messages"):
        ChatTemplate(source, {}).render([])


@pytest.mark.parametrize("attack", ATTACKS)
def test_template_cannot_leave_its_sandbox(attack: str) -> None:
    with pytest.raises(UserError):
        ChatTemplate(attack, {}).render([])


def test_a_checkpoints_own_template_and_special_tokens(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["bos_token"] = {"content": "<|startoftext|>", "lstrip": False}  # the other spelling
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}")
    tokenizer = Tokenizer.of(Checkpoint.open(tmp_path))
    assert tokenizer.chat is not None
    assert tokenizer.chat.render([{"content": "Hi"}]) == "<|startoftext|>Hi<|return|>"
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.of(Checkpoint.open(tmp_path))
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        Tokenizer.of(Checkpoint.open(tmp_path))


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer)
    return [*(stream.feed(token) for token in ids), stream.flush()]


@given(ids=st.lists(st.integers(0, VOCAB - 1), max_size=60))
@settings(max_examples=400, deadline=None)
def test_streamed_pieces_add_up_to_the_whole_text(tokenizer: Tokenizer, ids: list[int]) -> None:
    """Random ids are mostly bytes that are no UTF-8, cut anywhere."""
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


# hypothesis tries the strings of this file too, and a special token is no text
@given(text=st.text(max_size=40).filter(lambda text: not any(name in text for name in SPECIAL)))
@settings(max_examples=200, deadline=None)
def test_streamed_text_never_shows_half_a_character(tokenizer: Tokenizer, text: str) -> None:
    pieces = streamed(tokenizer, tokenizer.encode(text, special=False))
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_text_is_streamed_at_once(tokenizer: Tokenizer) -> None:
    """Nothing but unfinished characters is held back."""
    ids = tokenizer.encode("the then there", special=False)
    assert all(streamed(tokenizer, ids)[:-1])


def test_special_tokens_are_no_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the<|return|> then<|startoftext|>", special=False)
    assert "".join(streamed(tokenizer, ids)) == "the then"


def test_harmony_headers_are_no_text(tokenizer: Tokenizer) -> None:
    answer = (
        "<|channel|>analysis<|message|>They ask.\nEasy.<|end|><|start|>assistant<|channel|>commentary"
        "<|message|><|end|><|start|>assistant<|channel|>final<|message|>東京.<|return|>"
    )
    ids = tokenizer.encode(answer, special=False)
    assert "".join(streamed(tokenizer, ids)) == "They ask.\nEasy.\n\n東京."


def test_a_character_cut_by_a_special_token_stays_cut(tokenizer: Tokenizer) -> None:
    vocab = tokenizer.tokenizer.get_vocab()
    ids = [vocab["Ã"], vocab["<|end|>"], vocab["©"], *tokenizer.encode("the", special=False)]  # C3 A9 is é
    assert "".join(streamed(tokenizer, ids)) == "\ufffd\ufffdthe"


def cut(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    matcher = StopStrings(stops)
    text = "".join(matcher.feed(piece) for piece in pieces)
    return text + matcher.flush(), matcher.found


STOPS = {
    "inside a piece": (["END"], ["some END more"], ("some ", True)),
    "across pieces": (["END"], ["some E", "N", "D more"], ("some ", True)),
    "almost": (["END"], ["some EN", "x EN"], ("some ENx EN", False)),
    "restart inside": (["aab"], ["aa", "ab", "c"], ("a", True)),
    "first to end wins": (["abcX", "bc"], ["abcX"], ("a", True)),
    "longer of two that end together": (["abc", "c"], ["zab", "c"], ("z", True)),
    "at the very beginning": (["\n"], ["\n"], ("", True)),
    "none": ([], ["a", "b"], ("ab", False)),
    "nothing after it": (["."], ["a.", "b."], ("a", True)),
}


@pytest.mark.parametrize("case", STOPS)
def test_stop_strings(case: str) -> None:
    stops, pieces, expected = STOPS[case]
    assert cut(stops, pieces) == expected


@given(
    text=st.text("abc", max_size=30),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    borders=st.lists(st.integers(0, 30), max_size=10),
)
@settings(max_examples=500, deadline=None)
def test_stop_strings_do_not_depend_on_borders(text: str, stops: list[str], borders: list[int]) -> None:
    edges = sorted({0, len(text), *(b for b in borders if b < len(text))})
    pieces = [text[a:b] for a, b in pairwise(edges)]
    found, stopped = cut(stops, pieces)
    assert (found, stopped) == cut(stops, [text]) == cut(stops, list(text))
    assert not any(stop in found for stop in stops)
    assert text.startswith(found) and stopped == any(stop in text for stop in stops)
    if not stopped:
        assert found == text


def test_text_is_held_back_no_longer_than_needed() -> None:
    matcher = StopStrings(["END"])
    assert [matcher.feed(piece) for piece in ("aE", "N", "E", "x")] == ["a", "", "EN", "Ex"]
