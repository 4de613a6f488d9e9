"""Messages: what they must be, and the right value in each of the shapes that a template may want."""

from typing import Any

import pytest

from epmoe.errors import UserError
from epmoe.text.habits import Habits
from epmoe.text.messages import check_conversation, shaped, text_of

OBJECT = Habits(encodes_arguments=True, prints_arguments=False)
EITHER = Habits(encodes_arguments=True)
PARTS, BOTH = Habits(reads_parts=True, reads_text=False), Habits(reads_parts=True)
TWO = [{"type": "text", "text": "One, "}, {"type": "text", "text": "two."}]


def part(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def one(message: dict[str, Any], habits: Habits | None = None) -> dict[str, Any]:
    (made,) = shaped([message], habits or Habits())
    return made


def test_nulls_of_a_message_are_left_out() -> None:
    assert one({"role": "user", "content": None, "tool_calls": None, "x": 0, "y": ""}) == {
        "role": "user",
        "x": 0,
        "y": "",
    }
    inner = {"role": "tool", "content": {"a": None}}
    assert one(inner) == inner


def test_reasoning_stands_under_the_names_that_templates_read() -> None:
    for name in ("reasoning", "reasoning_content", "thinking"):
        made = one({"role": "assistant", name: "Hm."})
        assert (made["thinking"], made["reasoning_content"]) == ("Hm.", "Hm.")
    made = one({"role": "assistant", "reasoning_content": "A", "thinking": "B", "reasoning": "C"})
    assert (made["reasoning_content"], made["thinking"], made["reasoning"]) == ("A", "B", "C")
    assert one({"role": "assistant", "reasoning": "C", "thinking": "B"})["reasoning_content"] == "B"
    assert one({"role": "assistant", "thinking": None, "content": ""}) == {"role": "assistant", "content": ""}


def test_a_template_that_reads_reasoning_alone_gets_it_there() -> None:
    given = {"role": "assistant", "thinking": "Hm."}
    assert one(given, Habits(reasoning=frozenset({"reasoning"})))["reasoning"] == "Hm."
    assert "reasoning" not in one(given, Habits(reasoning=frozenset({"reasoning", "thinking"})))


def test_parts_are_joined_for_templates_that_read_text() -> None:
    assert one({"role": "user", "content": TWO})["content"] == "One, two."
    assert one({"role": "tool", "content": TWO})["content"] == "One, two."
    for habits in (PARTS, BOTH):  # it is either, as the template takes it
        content = one({"role": "user", "content": TWO}, habits)["content"]
        assert content == "One, two." and list(content) == TWO and content[1] == TWO[1]
    content = one({"role": "user", "content": "Hi"}, Habits(knows_parts=True))["content"]
    assert content == "Hi" and list(content) == part("Hi") and content[1] == "i"
    assert list(one({"role": "user", "content": "Hi"}, PARTS)["content"]) == ["H", "i"]
    asks = Habits(reads_parts=True, tests_content=True)
    assert one({"role": "user", "content": TWO}, asks)["content"] is TWO
    assert one({"role": "user", "content": []})["content"] == ""
    for result in ([1, 2], [], {"a": 1}, [{"a": 1}], 3.5, False):
        assert one({"role": "tool", "content": result})["content"] == result
    assert text_of(TWO) == "One, two." and text_of("x") == "x" and text_of(None) == text_of([]) == ""


@pytest.mark.parametrize("nested", [False, True])
def test_arguments_are_encoded_once(nested: bool) -> None:
    def arguments(given: Any, habits: Habits) -> Any:
        call: dict[str, Any] = {"name": "f", "arguments": given}
        made = one({"role": "assistant", "tool_calls": [{"id": "1", "function": call} if nested else call]}, habits)
        (call,) = made["tool_calls"]
        return call["function"]["arguments"] if nested else call["arguments"]

    value, text = {"a": [1, "é"], "b": None}, '{"a": [1, "é"], "b": null}'
    assert arguments(text, OBJECT) == arguments(value, OBJECT) == value
    for habits in (Habits(), EITHER):
        assert (arguments(text, habits), arguments(value, habits)) == (text, value)
        assert str(arguments(text, habits)) == str(arguments(value, habits)) == text
        assert dict(arguments(text, habits)) == dict(arguments(value, habits)) == value
    assert arguments("", OBJECT) == arguments(" ", OBJECT) == {}
    with pytest.raises(UserError, match=r"messages\[0\]\.tool_calls\[0\].* is not JSON .*: give an object"):
        arguments('{"a": ', OBJECT)
    with pytest.raises(UserError, match="'a' occurs twice"):
        arguments('{"a": 1, "a": 2}', OBJECT)


def test_what_is_given_stays_as_it_is() -> None:
    calls = [{"function": {"arguments": "{}"}}]
    message = {"role": "assistant", "content": TWO, "tool_calls": calls, "thinking": "Hm.", "x": None}
    shaped([message], OBJECT)
    assert message == {"role": "assistant", "content": TWO, "tool_calls": calls, "thinking": "Hm.", "x": None}
    assert calls == [{"function": {"arguments": "{}"}}]


def test_what_is_no_call_is_for_the_template_to_judge() -> None:
    for calls in ("text", 3, [None, "x", {"function": "f"}, {"arguments": 3}]):
        assert one({"role": "assistant", "tool_calls": calls}, OBJECT)["tool_calls"] == calls


REFUSED: dict[str, list[Any]] = {
    "must be a list of objects": ["text", 3, None, {}, [], ["x"], [{}], [{"role": 3}], ({"role": "user"},)],
    r"messages\[0\] \(user\): content is neither text nor a list of parts": [
        [{"role": "user", "content": value}] for value in (3, True, {"type": "text", "text": "x"})
    ],
    r"content\[1\] is of type 'image_url', but only text is read: leave it out": [
        [{"role": role, "content": [*part("x"), {"type": "image_url", "image_url": {"url": "x"}}]}]
        for role in ("user", "system", "tool")
    ],
    r"content\[0\] is no part such as": [
        [{"role": "user", "content": [each]}]
        for each in ("x", {}, {"type": "text"}, {"type": "text", "text": 3}, {"type": 3})
    ],
}  # fmt: skip


@pytest.mark.parametrize("says", REFUSED)
def test_what_is_no_conversation_is_refused(says: str) -> None:
    for value in REFUSED[says]:
        with pytest.raises(UserError, match=f"p.jsonl:3: .*{says}"):
            check_conversation("p.jsonl:3", value)


def test_conversations_that_pass() -> None:
    check_conversation("p", [{"role": "user", "content": TWO}, {"role": "user"}, {"role": "user", "content": None}])
    check_conversation("p", [{"role": "tool", "content": value} for value in ([], [1], {"a": 1}, 3, [{"a": 1}])])
    check_conversation("p", [{"role": "user", "content": []}])
