"""Items become messages: those of a turn stand in one, and none is lost."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epmoe.server.errors import ApiError
from epmoe.server.openai.items import listed, messages
from epmoe.text.messages import check_conversation

USER: Any = {"role": "user", "content": "Rain?"}
CALL: Any = {"type": "function_call", "call_id": "c1", "name": "rain", "arguments": "{}", "id": "fc_1", "status": "x"}
MADE: Any = {"id": "c1", "type": "function", "function": {"name": "rain", "arguments": "{}"}}
ANOTHER: Any = {"id": "c2", "type": "function", "function": {"name": "sun", "arguments": "{}"}}
OTHER: Any = {**CALL, "call_id": "c2", "name": "sun"}
OUTPUT: Any = {"type": "function_call_output", "call_id": "c1", "output": "wet"}
TOLD: Any = {"role": "tool", "tool_call_id": "c1", "name": "rain", "content": "wet"}


def thought(*texts: str) -> dict[str, Any]:
    content = [{"type": "reasoning_text", "text": text} for text in texts]
    return {"type": "reasoning", "id": "rs_1", "summary": [], "content": content, "encrypted_content": None}


def said(text: str, **more: Any) -> dict[str, Any]:
    return {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}], **more}


CASES: dict[str, tuple[list[Any], list[Any]]] = {
    "a text": ([USER], [USER]),
    "parts": (
        [{"role": "developer", "content": [{"type": "input_text", "text": "Be "}, {"type": "text", "text": "brief"}]}],
        [{"role": "developer", "content": "Be brief"}],
    ),
    "no words": ([{"role": "user", "content": []}], [{"role": "user", "content": ""}]),
    "a refusal": (
        [{"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}],
        [{"role": "assistant", "content": "No."}],
    ),
    "a turn": (
        [USER, thought("They", " ask."), said("Yes.", phase="final_answer"), USER],
        [USER, {"role": "assistant", "content": "Yes.", "reasoning_content": "They ask."}, USER],
    ),
    "two thoughts": (
        [thought("A"), thought("B"), said("C")],
        [{"role": "assistant", "content": "C", "reasoning_content": "A\n\nB"}],
    ),
    "a summary": (
        [{"type": "reasoning", "summary": [{"type": "summary_text", "text": "A"}]}, said("C")],
        [{"role": "assistant", "content": "C", "reasoning_content": "A"}],
    ),
    "a call": (
        [USER, thought("A"), CALL, OUTPUT],
        [USER, {"role": "assistant", "reasoning_content": "A", "tool_calls": [MADE]}, TOLD],
    ),
    "words and a call": ([said("I look."), CALL], [{"role": "assistant", "content": "I look.", "tool_calls": [MADE]}]),
    "all three": (
        [thought("A"), said("I look.", phase="commentary"), CALL, OUTPUT],
        [
            {"role": "assistant", "content": "I look."},
            {"role": "assistant", "reasoning_content": "A", "tool_calls": [MADE]},
            TOLD,
        ],
    ),
    "calls together": (
        [CALL, OTHER, OUTPUT],
        [
            {"role": "assistant", "tool_calls": [MADE, ANOTHER]},
            TOLD,
        ],
    ),
    "a call after an output": (
        [CALL, OUTPUT, thought("B"), OTHER],
        [
            {"role": "assistant", "tool_calls": [MADE]},
            TOLD,
            {
                "role": "assistant",
                "reasoning_content": "B",
                "tool_calls": [ANOTHER],
            },
        ],
    ),
    "cut while it thought": (
        [USER, thought("A"), USER],
        [USER, {"role": "assistant", "content": "", "reasoning_content": "A"}, USER],
    ),
    "ends while it thinks": ([thought("A")], [{"role": "assistant", "content": "", "reasoning_content": "A"}]),
    "empty reasoning": ([thought(), said("C")], [{"role": "assistant", "content": "C"}]),
    "an output of parts": (
        [CALL, {**OUTPUT, "output": [{"type": "input_text", "text": "wet"}]}],
        [{"role": "assistant", "tool_calls": [MADE]}, TOLD],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_messages_of_items(name: str) -> None:
    items, expected = CASES[name]
    assert messages(None, items) == expected


def test_instructions_go_first() -> None:
    assert messages("Be brief.", [USER]) == [{"role": "system", "content": "Be brief."}, USER]
    developer = {"role": "developer", "content": "In Latin."}
    assert messages("Be brief.", [developer, USER])[0] == {"role": "developer", "content": "Be brief.\n\nIn Latin."}
    assert messages("", [USER]) == [USER]


def test_input_is_text_or_items() -> None:
    assert messages(None, listed("Rain?")) == [USER] and listed([USER]) == [USER]
    others: tuple[Any, ...] = (None, "", [], 3, {}, ["Rain?"])
    for wrong in others:
        with pytest.raises(ApiError) as caught:
            listed(wrong)
        assert caught.value.param == "input"


WRONG: list[tuple[Any, str]] = [
    ({"type": "item_reference", "id": "x"}, "'item_reference'"),
    ({"type": "computer_call"}, "'computer_call'"),
    ({"type": "message", "content": "x"}, "role and content"),
    ({"type": "message", "role": "user"}, "role and content"),
    ({"role": "critic", "content": "x"}, "'critic'"),
    ({"role": "user", "content": 3}, "neither text"),
    ({"role": "user", "content": ["x"]}, "no part"),
    ({"role": "user", "content": [{"type": "input_text"}]}, "no text"),
    ({"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}, "'input_image'"),
    ({"type": "function_call", "call_id": "c"}, "name and arguments"),
    ({"type": "function_call_output", "call_id": "c"}, "needs call_id, output"),
    (OUTPUT, "'c1'"),
    ({"type": "reasoning", "summary": [], "encrypted_content": "x"}, "encrypted"),
    ({"type": "reasoning", "content": [{"type": "reasoning_text", "text": 3}]}, "no text"),
    ({"type": "reasoning", "summary": 3}, "neither text"),
]


@pytest.mark.parametrize(("item", "says"), WRONG, ids=[says for _, says in WRONG])
def test_an_item_that_is_not_served_is_named(item: Any, says: str) -> None:
    with pytest.raises(ApiError, match=r"input\[1\]") as caught:
        messages(None, [USER, item])
    assert caught.value.status == 400 and caught.value.param == "input" and says in str(caught.value)


NAMES = ("type", "role", "content", "call_id", "name", "arguments", "output", "summary", "text", "refusal", "id")
WORDS = (
    "message", "reasoning", "function_call", "function_call_output", "user", "assistant", "developer", "input_text",
    "output_text", "reasoning_text", "c1", "Rain?",
)  # fmt: skip
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=6),
    max_leaves=12,
)


@given(
    st.lists(
        st.dictionaries(st.sampled_from(NAMES), ANY, max_size=7) | st.sampled_from([USER, CALL, OUTPUT]), max_size=4
    )
)
@settings(max_examples=150, deadline=None)
def test_whatever_comes_is_a_conversation_or_refused(items: list[Any]) -> None:
    try:
        found = messages("Be brief.", items)
    except ApiError as error:
        assert error.status == 400 and error.param == "input"
        return
    check_conversation("x", found)
