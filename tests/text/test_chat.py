"""Chat: templates byte for byte as transformers renders them; one that misbehaves is one line and does no harm."""

import copy
import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from conversations import CONVERSATIONS as CORPUS
from conversations import TOOLS as CORPUS_TOOLS
from jinja2 import TemplateError
from small_bpe import SPECIAL, make_tokenizer
from templates import STYLES, Style
from transformers import PreTrainedTokenizerFast

from epmoe.errors import UserError
from epmoe.text.chat import ChatTemplate


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


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


# --- the corpus: every conversation through every style, beside transformers ------------------------------------------


def text_of(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def call_for(style: Style, call: dict[str, Any]) -> dict[str, Any]:
    """A tool call with arguments as the style wants them; the texts of the corpus are as `json` writes them."""
    if "function" in call:
        return {**call, "function": call_for(style, call["function"])}
    given = call["arguments"]
    if style.arguments == "object" and isinstance(given, str):
        return {**call, "arguments": json.loads(given)}
    if style.arguments == "text" and not isinstance(given, str):
        return {**call, "arguments": json.dumps(given, ensure_ascii=False)}
    return call


def meant(style: Style, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What transformers leaves to its caller: content and arguments in the shape that the style is written for."""
    made = []
    for message in messages:
        message = dict(message)
        content = message.get("content")
        if content in ([], [1, 2]):  # of no parts
            message["content"] = "" if message["role"] == "user" and not style.parts else content
        elif isinstance(content, list) and not style.parts:
            message["content"] = text_of(content)
        if message.get("tool_calls"):
            message["tool_calls"] = [call_for(style, call) for call in message["tool_calls"]]
        made.append(message)
    return made


def outcome(render: Callable[..., str], *arguments: Any, **variables: Any) -> str | None:
    """None: the template refuses, which is an error of its own in either library."""
    try:
        return render(*arguments, **variables)
    except (UserError, TemplateError, TypeError):
        return None


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.name)
def test_a_corpus_of_conversations_renders_as_in_transformers(file: Path, style: Style) -> None:
    special = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1]}
    oracle = PreTrainedTokenizerFast(tokenizer_file=str(file), chat_template=style.source, **special)
    ours = ChatTemplate(style.source, special)
    rendered = 0
    for name, messages in CORPUS.items():
        before = copy.deepcopy(messages)
        for more in ({"add_generation_prompt": False}, {"tools": CORPUS_TOOLS, "reasoning_effort": "high"}):
            variables: dict[str, Any] = {"add_generation_prompt": True, **more}
            theirs = outcome(oracle.apply_chat_template, meant(style, messages), tokenize=False, **variables)
            assert outcome(ours.render, messages, **variables) == theirs, name
            rendered += theirs is not None
        assert messages == before, "the caller's messages were changed"
    assert rendered > len(CORPUS), "most of them were refused"


SMALL = [
    "{% generation %}{% set a = 'in' %}{{ a }}{% endgeneration %}|{{ a }}",
    "{% set a = 'out' %}{%- generation -%} {{ a }}{% set a = 'in' %} {%- endgeneration %}{{ a }}",
    "{% for m in messages %}{% generation %}{{ loop.index }}{{ m.content }}\n{% endgeneration %}\n{% endfor %}",
    "{% for m in messages %}{% generation %}{% break %}{% endgeneration %}{% endfor %}",
    "{% generation %}a",
    "{% break %}",
    "{% set n = namespace(_a=1) %}{{ n }}",
    "{% set n = namespace({'__html__': 1}, b=2) %}x",
    "{% set n = namespace(b=2) %}{% set n._b = 3 %}x",
    "{% set n = namespace({'a': 1}, self=2) %}{% set n.a = n.a + n.self %}{{ n.a }}",
    "{{ {'a': '<é>'} | tojson(indent=1) }}{{ [1, 2] | tojson(separators=(',', ':')) }}{{ {'b': 1, 'a': 2} | tojson }}",
    "{{ messages[0].nothing.more }}",
    "{{ messages[0].nothing }}{{ nothing }}{{ tools }}{{ documents }}{{ eos_token }}",
]


@pytest.mark.parametrize("source", SMALL)
def test_small_templates_render_or_fail_as_in_transformers(file: Path, source: str) -> None:
    oracle = PreTrainedTokenizerFast(tokenizer_file=str(file), chat_template=source)
    messages = [{"role": "user", "content": "Hi"}]
    theirs: str | None
    try:
        theirs = oracle.apply_chat_template(messages, tokenize=False)
    except (TemplateError, SyntaxError):
        theirs = None
    assert outcome(lambda: ChatTemplate(source, {}).render(messages)) == theirs


def test_the_corpus_is_one() -> None:
    """At least 40 conversations with what the project promises equality for."""
    assert len(CORPUS) >= 40 and len(STYLES) >= 5
    texts = {name: json.dumps(messages) for name, messages in CORPUS.items()}
    for what in ("tool_calls", "reasoning", '"type": "text"', "null", '"developer"', '"system"', '"arguments": "{'):
        assert sum(what in text for text in texts.values()) >= 3, what
    assert sum(len(messages) >= 4 for messages in CORPUS.values()) >= 10


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


RAISED = {
    "{{ 1 // 0 }}": "refuses the messages: ",
    "{{ range(10**9) | list }}": "refuses the messages: ",
    "{{ 'x' + 1 }}": "refuses the messages: ",
    "{{ [][0].x }}": "refuses the messages: ",
    "{{ 'x' * (10**15 + (messages | length)) }}": "takes more than 384 MB of memory: use chat=off",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "refuses the messages: maximum recursion depth",
    "{{ 2.0 ** (10**6 + (messages | length)) }}": "refuses the messages: .*out of range",
    "{% break %}": r"is no valid jinja \('break' outside loop.*: use chat=off",
    "{{ " + "(" * 9999: r"is no valid jinja \(maximum recursion depth.*: use chat=off",
    "{{ " + "[" * 500 + "]" * 500 + " }}": r"(is no valid jinja|refuses the messages)",
    "{{ " + "9" * 5000 + " }}": "is no valid jinja",
}


@pytest.mark.parametrize("source", RAISED, ids=range(len(RAISED)))
def test_whatever_a_template_raises_is_one_line(source: str) -> None:
    with pytest.raises(UserError, match=f"^the checkpoint's chat template {RAISED[source]}") as caught:
        ChatTemplate(source, {}).render([])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("attack", ATTACKS)
def test_template_cannot_leave_its_sandbox(attack: str) -> None:
    with pytest.raises(UserError):
        ChatTemplate(attack, {}).render([])
