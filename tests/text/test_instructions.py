"""Instructions: no word of the system or the developer vanishes, whatever a template makes of two of them."""

from typing import Any

import pytest
from conversations import Message, assistant, developer, parts, system, user
from templates import CHATML, DEEPSEEK, HARMONY, LLAMA, MISTRAL, PLAIN, STYLES, Style

from epmoe.errors import UserError
from epmoe.text.chat import ChatTemplate
from epmoe.text.instructions import rendered

FIRST = "Be polite."
DEAF = Style("deaf", "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")


def made(style: Style, messages: list[Message], key: str | None = None, **variables: Any) -> str:
    return rendered(ChatTemplate(style.source, {"bos_token": "<s>", "eos_token": "</s>"}), messages, key, variables)


@pytest.mark.parametrize("style", [style for style in STYLES if style is not DEEPSEEK], ids=lambda style: style.name)
def test_the_key_system_beside_a_developers_message(style: Style) -> None:
    """Both stay, in this order. DeepSeek's style knows no developer."""
    messages = [developer(), user("Hi")]
    if style is MISTRAL:
        with pytest.raises(UserError, match="refuses the messages: only user"):
            made(style, messages, FIRST)
        return
    text = made(style, messages, FIRST)
    assert 0 <= text.find(FIRST) < text.find("Answer in Latin.") < text.find("Hi")
    assert text.count(FIRST) == text.count("Answer in Latin.") == 1


def test_a_template_of_one_instruction_gets_both_in_one() -> None:
    text = made(HARMONY, [developer(), user("Hi")], FIRST)
    assert f"developer<|message|># Instructions\n\n{FIRST}\n\nAnswer in Latin.\n\n<|end|>" in text
    assert text == made(HARMONY, [developer(f"{FIRST}\n\nAnswer in Latin."), user("Hi")])
    assert text == made(HARMONY, [developer(parts("Answer in ", "Latin.")), user("Hi")], FIRST)
    empty: tuple[Any, ...] = ("", None, [])
    for nothing in empty:
        assert made(HARMONY, [developer(nothing), user("Hi")], FIRST) == made(HARMONY, [developer(FIRST), user("Hi")])


def test_a_template_that_refuses_a_second_instruction_gets_both_in_one() -> None:
    strict = Style(
        "strict",
        "{% if messages[1].role != 'user' %}{{ raise_exception('one') }}{% endif %}"
        "{% for m in messages %}[{{ m.role }}: {{ m.content }}]{% endfor %}",
    )
    assert made(strict, [developer("B"), user("C")], "A") == "[developer: A\n\nB][user: C]"
    assert made(strict, [developer(""), user("C")], "A") == "[developer: A][user: C]"


def test_a_template_of_any_role_gets_two() -> None:
    text = made(PLAIN, [developer(), user("Hi")], FIRST)
    assert text.startswith(
        f"<|start|>system<|message|>{FIRST}<|end|><|start|>developer<|message|>Answer in Latin.<|end|>"
    )


def test_the_key_system_is_for_conversations_without_a_system_message() -> None:
    for style in (HARMONY, CHATML, LLAMA, MISTRAL, DEEPSEEK, PLAIN):
        messages = [user("Hi")]
        assert made(style, messages, FIRST) == made(style, [system(FIRST), *messages])
        own = [system("Be brief."), *messages]
        assert made(style, own, FIRST) == made(style, own)


VANISHING = [
    (HARMONY, [system(), developer(), user()], "messages[1] (developer)"),
    (HARMONY, [developer(), system(), user()], "messages[1] (system)"),
    (HARMONY, [system(), user(), assistant(), system("In Greek."), user("And?")], "messages[3] (system)"),
    (HARMONY, [system(), user(), assistant(), developer(parts("In Greek.")), user("And?")], "messages[3] (developer)"),
    (HARMONY, [system("Hi"), developer("Hi"), user("Hi")], "messages[1] (developer)"),  # the same words elsewhere
    (DEEPSEEK, [developer(), user()], "messages[0] (developer)"),
    (DEAF, [system(), user()], "messages[0] (system)"),
]


@pytest.mark.parametrize(("style", "messages", "place"), VANISHING)
def test_a_conversation_of_whose_instructions_one_would_vanish(
    style: Style, messages: list[Message], place: str
) -> None:
    with pytest.raises(UserError) as caught:
        made(style, messages)
    assert str(caught.value).startswith(f"{place}: the checkpoint's chat template drops these words: write them into")


def test_the_refusal_names_the_places_of_the_line() -> None:
    """Also where a message was put before it."""
    with pytest.raises(UserError, match=r"^system='Be polite\.': .* drops these words"):
        made(DEAF, [user()], FIRST)
    for key in (None, FIRST):
        with pytest.raises(UserError, match=r"^messages\[2\] \(developer\): "):
            made(HARMONY, [user(), assistant(), developer(), user()], key)
        with pytest.raises(UserError, match=r"^messages\[1\] \(developer\): "):
            made(HARMONY, [developer(), developer("Now."), user()], key)


def test_words_that_a_template_changes_have_not_vanished() -> None:
    shout = Style("shout", "{% for m in messages %}{{ m.content | upper | tojson }}{% endfor %}")
    assert made(shout, [system('"a"\n'), user("b")]) == r'"\"A\"\n""B"'
    for style in (LLAMA, CHATML, DEEPSEEK):  # the time of the day, trimmed text, several of the system
        assert made(style, [system(" Be brief.\n"), user(), assistant(), system("In Greek."), user()])
    assert made(DEAF, [system(""), system(" \n"), user("Hi")]) == "Hi"


def test_a_template_that_tells_the_time_hides_nothing() -> None:
    """All that is compared is made at one moment."""
    clock = Style("clock", "{{ strftime_now('%H:%M:%S.%f') }}" + DEAF.source)
    with pytest.raises(UserError, match=r"^messages\[0\] \(system\)"):
        made(clock, [system(), user()])
    tools = [{"type": "function", "function": {"name": "f", "description": "F", "parameters": {"properties": {}}}}]
    assert "type f" in made(HARMONY, [system(), user()], tools=tools)


def test_many_instructions_take_few_renderings(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for the text and one that shows all of them at once; a template that changes words takes one for each."""
    renderings = 0
    render = ChatTemplate.render

    def counted(*arguments: Any, **variables: Any) -> str:
        nonlocal renderings
        renderings += 1
        return render(*arguments, **variables)

    monkeypatch.setattr(ChatTemplate, "render", counted)
    many = [message for turn in range(100) for message in (system(f"{turn}."), user())]
    assert made(CHATML, many).count("Rain?") == 100 and renderings == 2
    shout = Style("shout", "{% for m in messages %}{{ m.content | upper }}{% endfor %}")
    assert "99.RAIN?" in made(shout, many) and renderings == 2 + 2 + 100
    lost = [*many, developer("Lost."), user()]
    with pytest.raises(UserError, match=r"^messages\[200\] \(developer\): .* drops these words"):
        made(DEEPSEEK, lost)
    assert renderings == 2 + 2 + 100 + 3


@pytest.mark.parametrize("role", ["System", " system", "Developer", "critic"])
def test_words_of_a_misspelled_role_do_not_vanish(role: str) -> None:
    source = "{% for m in messages %}{% if m.role in ['system', 'user'] %}{{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises(UserError, match=rf"^messages\[0\] \({role}\): .* drops these words"):
        made(Style("strict", source), [{"role": role, "content": "Be brief."}, user()])


def test_a_system_message_of_nothing_is_none() -> None:
    conversation = [{"role": "developer", "content": "Be brief."}, user()]
    assert made(HARMONY, conversation, "") == made(HARMONY, conversation)
