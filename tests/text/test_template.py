"""Template: hostile ones are refused within limits, published ones take their fill, and each says what it reads."""

import json
import re
import subprocess
import sys
from typing import Any

import pytest
from hostile import HOSTILE, LONG
from templates import HARMONY, STYLES, Style

from epmoe.text.bounded import Bounded, ExceededError, Limits
from epmoe.text.chat import ChatTemplate
from epmoe.text.template import Template, answer

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
HURRIED = Bounded("epmoe.text.template:answer", Limits(seconds=0.2))
# Where another bound must come first, however slow the machine is: some hundred megabytes may take it a second.
PATIENT = Bounded("epmoe.text.template:answer", Limits(seconds=30))


def said(source: str, template: Bounded) -> str:
    """What is said of a template that must be refused, in the words of `ChatTemplate`."""
    call = {"source": source, "messages": [{"role": "user", "content": "Hi"}], "variables": {}, "now": "2026-01-01"}
    try:
        match template(call):
            case {"refused": words}:
                return f"refuses the messages: {words}"
            case {"broken": words}:
                return f"is no valid jinja ({words})"
    except ExceededError as error:
        return str(error)
    return "renders"


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_refused(name: str) -> None:
    source, says = HOSTILE[name]
    template = HURRIED if LONG in says else PATIENT
    assert re.match(says, words := said(source, template)), words


REFUSED = """
import json, resource, sys, time
from epmoe.errors import UserError
from epmoe.text.chat import ChatTemplate
begin = time.monotonic()
try:
    ChatTemplate(sys.argv[1], {}).render([{"role": "user", "content": "Hi"}])
except UserError as error:
    took = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(json.dumps([str(error), time.monotonic() - begin, took.ru_utime + took.ru_stime, took.ru_maxrss]))
"""


@pytest.mark.parametrize("name", ["powers of powers", "doubled"])
def test_the_refusal_is_one_line_and_takes_little(name: str) -> None:
    """With the limits that users have, in a process that has no other children; the clock is also others'."""
    run = subprocess.run([sys.executable, "-c", REFUSED, HOSTILE[name][0]], capture_output=True, text=True, timeout=120)
    line, clock_s, processor_s, kilobytes = json.loads(run.stdout)
    assert re.match("the checkpoint's chat template (runs|takes) .*: use chat=off", line) and "\n" not in line
    assert clock_s < 40 and processor_s < 2 and kilobytes < 500_000, (clock_s, processor_s, kilobytes)


MANY = [{"role": "user" if turn % 2 == 0 else "assistant", "content": f"word {turn} " * 100} for turn in range(9_999)]
LARGE = [{"role": "user", "content": "word é " * 1_500_000}]


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.name)
def test_ten_thousand_messages_and_ten_megabytes_go_through(style: Style) -> None:
    for messages in (MANY, LARGE):
        text = ChatTemplate(style.source, SPECIAL).render(messages)
        assert text.count(messages[-1]["content"].strip()) == 1
        assert len(text) > sum(len(message["content"].strip()) for message in messages)


READS = {
    "{{ a }}{{ b.c }}{{ d['e'] }}": {"a", "b", "d"},
    "{{ messages }}{{ add_generation_prompt }}{{ raise_exception('x') }}{{ strftime_now('%Y') }}{{ range(3) }}": set(),
    "{% if not a is defined %}{% set a = 1 %}{% endif %}{{ a }}": {"a"},
    "{% set a = a | default(1) %}{{ a }}": {"a"},
    "{% set a = 1 %}{{ a }}": set(),
    "{% if b %}{% set a = 1 %}{% else %}{% set a = 2 %}{% endif %}{{ a }}": {"b"},
    "{% if b %}{% set a = 1 %}{% elif c %}{% set a = 3 %}{% else %}{% set a = 2 %}{% endif %}{{ a }}": {"b", "c"},
    "{% if b %}{% set a = 1 %}{% endif %}{{ a }}": {"a", "b"},
    "{% for a in b %}{{ a }}{{ loop.index }}{% endfor %}{{ a }}": {"a", "b"},
    "{% for a, b in c if d %}{{ a }}{{ b }}{% else %}{{ e }}{% endfor %}": {"c", "d", "e"},
    "{% for x in c %}{% set a = 1 %}{% endfor %}{{ a }}": {"a", "c"},
    "{% for x in c %}{% set a = 1 %}{{ a }}{% endfor %}": {"c"},
    "{% macro f(a, b=c) %}{{ a }}{{ b }}{{ d }}{{ caller() }}{{ f(a) }}{% endmacro %}{{ f(e) }}": {"c", "d", "e"},
    "{% set a %}{{ b }}{% endset %}{{ a }}": {"b"},
    "{% set n = namespace(a=b) %}{% set n.c = d %}{{ n.e }}": {"b", "d"},
    "{% generation %}{% set a = 1 %}{{ a }}{% endgeneration %}{{ a }}": {"a"},
    "{% with a = b %}{{ a }}{% endwith %}{{ a }}": {"a", "b"},
    "{% filter upper %}{{ a }}{% endfilter %}{% call(b) c() %}{{ b }}{% endcall %}": {"a", "c"},
    "{% set a, b = c, d %}{{ a }}{{ b }}": {"c", "d"},
}


@pytest.mark.parametrize("source", READS)
def test_the_variables_that_a_template_reads(source: str) -> None:
    assert Template(source).reads == READS[source]


def test_the_variables_that_styles_read() -> None:
    found = {style.name: {*ChatTemplate(style.source, SPECIAL).reads(tools=False)} for style in STYLES}
    assert found == {
        "harmony": {"builtin_tools", "reasoning_effort", "tools"},
        "chatml": {"enable_thinking", "tools"},
        "llama": {"date_string", "tools"},
        "mistral": {"rules", "tools"},  # which it sets where there is a system message
        "deepseek": set(),
        "generation": set(),
        "vision": {"tools"},
        "plain": set(),
    }


def test_an_answer_says_which_of_four_things_came_of_a_call() -> None:
    call: dict[str, Any] = {"source": HARMONY.source, "variables": {"add_generation_prompt": True}, "now": "2026-01-02"}
    assert answer({"source": "{% if"}).keys() == {"broken"}
    assert answer({"source": "a"}) == {"reads": []}
    assert answer({**call, "messages": []}).keys() == {"refused"}
    text = answer({**call, "messages": [{"role": "user", "content": "Hi"}]})["text"]
    assert "Date: 2026-01-02\n" in text and text.endswith("<|start|>assistant")
    calls = [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]
    assert "is not JSON" in answer({**call, "messages": calls})["wrong"]
