"""Habits: what a template does with content, arguments and reasoning is read from it, however it spells that."""

from dataclasses import dataclass

import jinja2
import pytest
from templates import STYLES, Style

from epmoe.text.habits import Habits
from epmoe.text.template import Template


@dataclass(frozen=True)
class Case:
    name: str
    source: str
    habits: Habits


OBJECT = Habits(encodes_arguments=True, prints_arguments=False)
EITHER = Habits(encodes_arguments=True, prints_arguments=True)
PARTS, BOTH = Habits(reads_parts=True, reads_text=False), Habits(reads_parts=True)

CASES = [
    Case("nothing", "{{ bos_token }}", Habits()),
    Case("prints content", "{% for m in messages %}{{ m.content }}{% endfor %}", Habits()),
    Case("joins content to text", "{{ 'a' ~ m['content'] + 'b' }}", Habits()),
    Case("splits content", "{% set c = m.content %}{% for x in c.split(' ') %}{{ x }}{% endfor %}", Habits()),
    Case("asks for text alone", "{% if m.content is string %}{{ m.content }}{% endif %}", Habits(tests_content=True)),
    Case("goes over parts", "{% for p in m.content %}{{ p.text }}{% endfor %}", PARTS),
    Case("some parts", "{% for p in m['content'] if p.type == 'text' %}{{ p.text }}{% endfor %}", PARTS),
    Case("parts through filters", "{{ m.content | selectattr('type', 'equalto', 'text') | list }}", PARTS),
    Case("the first part", "{{ m['content'][0]['text'] }}", PARTS),
    Case("the first part by attributes", "{{ m.content[0].text }}", PARTS),
    Case("the first letter", "{{ m.content[0] }}", Habits()),
    Case("through get", "{% for p in m.get('content') %}{{ p.text }}{% endfor %}", PARTS),
    Case("through a variable", "{% set c = m.content or [] %}{% for p in c %}{{ p.text }}{% endfor %}", PARTS),
    Case("through two", "{% set b = m.content %}{% set c = b | default('') %}{% for p in c %}{% endfor %}", PARTS),
    Case(
        "text or parts",
        "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p }}{% endfor %}{% endif %}",
        Habits(reads_parts=True, tests_content=True),
    ),
    Case("text of one role, parts of another", "{{ a.content }}{% for p in b.content %}{{ p.text }}{% endfor %}", BOTH),
    Case(
        "through a macro",
        "{% macro f(n, c) %}{% for p in c %}{{ p.text }}{% endfor %}{% endmacro %}{{ f(1, m.content) }}",
        PARTS,
    ),
    Case(
        "through a macro by name",
        "{% macro f(n=1, c='') %}{% for p in c %}{{ p.text }}{% endfor %}{% endmacro %}{{ f(c=m.content) }}",
        PARTS,
    ),
    Case("another macro's list", "{% macro f(c) %}{% for p in c %}{% endfor %}{% endmacro %}{{ f(tools) }}", Habits()),
    Case("arguments as JSON", "{{ call.arguments | tojson }}", OBJECT),
    Case("joined to text", "{{ 'a' + call['function']['arguments'] | tojson + 'b' }}", OBJECT),
    Case("through a variable of another name", "{% set a = call.arguments or {} %}{{ a | tojson(indent=2) }}", OBJECT),
    Case("item by item", "{% for k, v in call.arguments | items %}{{ k }}{% endfor %}", OBJECT),
    Case("item by item with a method", "{% for k, v in call.arguments.items() %}{{ k }}{% endfor %}", OBJECT),
    Case("key by key", "{% for k in call.arguments %}{{ call.arguments[k] }}{% endfor %}", OBJECT),
    Case("an object alone", "{% if c.arguments is mapping %}{{ c.arguments | tojson }}{% endif %}", OBJECT),
    Case("the whole call as JSON", "{% for c in m.tool_calls %}{{ c | tojson }}{% endfor %}", OBJECT),
    Case("the whole function as JSON", "{% set out = c.function | tojson %}{{ out[:-1] }}", OBJECT),
    Case("all calls as JSON", "{{ m.tool_calls | tojson }}", OBJECT),
    Case("arguments as they are", "{{ call.arguments }}", Habits()),
    Case("arguments in a text", "{{ '{' + call.function.arguments + '}' }}", Habits()),
    Case(
        "either, as it says",
        "{% if c.arguments is string %}{{ c.arguments }}{% else %}{{ c.arguments | tojson }}{% endif %}",
        EITHER,
    ),
    Case(
        "either, as it does",
        "{% if c.arguments is mapping %}{{ c.arguments | tojson }}{% else %}{{ c.arguments }}{% endif %}",
        EITHER,
    ),
    Case("as text in a variable", "{% set a = c.arguments | trim %}{{ c.arguments | tojson }}", EITHER),
    Case("tools as JSON, arguments as they are", "{{ t.function | tojson }}{{ c.function.arguments }}", EITHER),
    Case("thinking", "{{ m.thinking }}", Habits(reasoning=frozenset({"thinking"}))),
    Case("reasoning", "{{ m.get('reasoning') or m['x'] }}", Habits(reasoning=frozenset({"reasoning"}))),
    Case(
        "two names of it",
        "{% set r = m['reasoning_content'] or m.reasoning %}",
        Habits(reasoning=frozenset({"reasoning_content", "reasoning"})),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_templates_habits(case: Case) -> None:
    habits = Habits.of(jinja2.Environment().parse(case.source))
    assert habits == case.habits and habits.knows_parts is (".text" in case.source or "'text'" in case.source)


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.name)
def test_habits_of_whole_templates(style: Style) -> None:
    habits = Template(style.source).habits
    found = {(True, False): "object", (False, True): "text", (True, True): "either"}
    assert habits.reads_parts == style.parts and habits.reads_text
    arguments = found[habits.encodes_arguments, habits.prints_arguments]
    assert arguments == style.arguments or (style.name, arguments) == ("plain", "text")  # it has no calls


def test_a_template_of_any_depth() -> None:
    """As deep as jinja can parse it."""
    depth = 20
    source = "{% if x %}" * depth + "{% for p in m.content %}{{ p.text }}{% endfor %}" + "{% endif %}" * depth
    assert Habits.of(jinja2.Environment().parse(source)) == PARTS
