"""Faces: whatever a template does with content and arguments, in whichever shape they came, no word is lost."""

from typing import Any

import pytest

from epmoe.errors import UserError
from epmoe.text.chat import ChatTemplate
from epmoe.text.faces import Arguments

OBJECT, TEXT = {"town": "Ulm"}, '{"town": "Ulm"}'


def render(source: str, messages: list[dict[str, Any]]) -> str:
    return ChatTemplate(source, {}).render(messages)


CALL = "{% for m in messages %}{% for c in m.tool_calls %}%s{% endfor %}{% endfor %}"
NAMED = '{"name": "f", "arguments": {"town": "Ulm"}}'
ENCODED = {  # what a template does with a call → what is to be read, whether the arguments came as an object or a text
    "{{ c.function.arguments | tojson }}": TEXT,
    "{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}": NAMED,
    "{{ dict(name=c.function.name, arguments=c.function.arguments) | tojson }}": NAMED,
    "{{ c.function | tojson }}": NAMED,
    "{{ (c.function.arguments or {}) | tojson }}": TEXT,
    "{{ c.function.arguments | default({}) | tojson }}": TEXT,
    "{{ (c.function.arguments if c.function.arguments is defined else {}) | tojson }}": TEXT,
    "{% set n, a = c.function.name, c.function.arguments %}{{ a | tojson }}": TEXT,
    "{% set ns = namespace() %}{% set ns.a = c.function.arguments %}{{ ns.a | tojson }}": TEXT,
    "{% with a = c.function.arguments %}{{ a | tojson }}{% endwith %}": TEXT,
    "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}": "town=Ulm",
    "{% for k, v in c.function.arguments | items %}{{ k }}={{ v }}{% endfor %}": "town=Ulm",
    "{% for k, v in (c.function.arguments or {}).items() %}{{ k }}={{ v }}{% endfor %}": "town=Ulm",
    "{% for k, v in c.function.arguments | dictsort %}{{ k }}={{ v }}{% endfor %}": "town=Ulm",
    "{% for k in c.function.arguments or {} %}{{ k }}={{ c.function.arguments[k] }}{% endfor %}": "town=Ulm",
    "{{ c.function.arguments.town }}": "Ulm",
    "{{ c.function.arguments.get('town') }}": "Ulm",
    "{{ c.function.arguments }}": TEXT,
    "{{ '<' + c.function.arguments + '>' }}": f"<{TEXT}>",
    "{{ '<' ~ c.function.arguments ~ '>' }}": f"<{TEXT}>",
    "{% if c.function.arguments is string %}{{ c.function.arguments }}{% else %}{{ c.function.arguments | tojson }}"
    "{% endif %}": TEXT,
    "{% if c.function.arguments is mapping %}{{ c.function.arguments | tojson }}{% endif %}": TEXT,
}  # fmt: skip


@pytest.mark.parametrize("given", [OBJECT, TEXT], ids=["object", "text"])
@pytest.mark.parametrize("use", ENCODED)
def test_arguments(use: str, given: Any) -> None:
    calls = [{"function": {"name": "f", "arguments": given}}]
    messages = [{"role": "assistant", "tool_calls": calls}]
    assert render(CALL.replace("%s", use), messages) == ENCODED[use]


@pytest.mark.parametrize("given", [OBJECT, TEXT], ids=["object", "text"])
def test_arguments_within_larger_json(given: Any) -> None:
    messages = [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": given}}]}]
    for use in (
        "{{ messages | tojson }}",
        "{{ messages[0] | tojson }}",
        "{{ messages[0].tool_calls | map(attribute='function') | list | tojson }}",
        "{% set c = messages[0].tool_calls | first %}{{ c | tojson }}",
    ):
        assert NAMED in render(use, messages), use


LOOP = "{% for p in %s %}{{ p.text }}{% endfor %}"
READ = {  # what a template does with content → what is to be read of "Hi there", as one text or two parts
    "{{ m.content }}",
    "{{ m.content | trim }}",
    "{{ '' + m.content }}",
    "{{ m['content'] or '' }}",
    LOOP.replace("%s", "m.content"),
    LOOP.replace("%s", "m.content or []"),
    LOOP.replace("%s", "m.content | default([])"),
    LOOP.replace("%s", "(m.content if m.content else [])"),
    "{% if m.content is string %}{{ m.content }}{% else %}" + LOOP.replace("%s", "m.content") + "{% endif %}",
    "{% if true %}{{ m.content or '' }}{% else %}" + LOOP.replace("%s", "m.content") + "{% endif %}",
    "{% if false %}{{ m.content | default('') }}{% else %}" + LOOP.replace("%s", "m.content") + "{% endif %}",
}
PARTS_ONLY = {
    LOOP.replace("%s", "m.content[0:]"),
    "{% set r, c = m.role, m.content %}" + LOOP.replace("%s", "c"),
    "{% with c = m.content %}" + LOOP.replace("%s", "c") + "{% endwith %}",
    "{% set ns = namespace() %}{% set ns.c = m.content %}" + LOOP.replace("%s", "ns.c"),
    "{% set k = 'content' %}" + LOOP.replace("%s", "m[k]"),
    "{% set p = m.content[0] %}{{ p['text'] }}{{ m.content[1].text }}",
    "{{ m.content | join('', attribute='text') }}",
    LOOP.replace("%s", "m.content | reverse | list | reverse"),
}


@pytest.mark.parametrize("use", sorted(READ | PARTS_ONLY))
def test_content(use: str) -> None:
    source = "{% for m in messages %}" + use + "{% endfor %}"
    parts = [{"type": "text", "text": "Hi "}, {"type": "text", "text": "there"}]
    assert render(source, [{"role": "user", "content": parts}]) == "Hi there"
    if use in READ or "attribute=" in use:
        assert render(source, [{"role": "user", "content": "Hi there"}]) == "Hi there"


def test_letters_stay_letters() -> None:
    assert render("{% for x in messages[0].content %}{{ x }}-{% endfor %}", [{"role": "u", "content": "ab"}]) == "a-b-"


def test_arguments_that_are_no_json_print_and_are_refused_where_they_are_read() -> None:
    messages = [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{oops"}}]}]
    assert render(CALL.replace("%s", "{{ c.function.arguments }}"), messages) == "{oops"
    with pytest.raises(UserError, match=r"tool_calls\[0\].* is not JSON .*: give an object"):
        render(CALL.replace("%s", "{{ c.function.arguments | tojson }}"), messages)
    assert Arguments("  ", "x").value == {}
