"""Grammars of answers: the answer itself, or the whole of a harmony answer, from wherever the prompt has ended."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from harmony_cases import CONTROLS
from scripted import save_tokenizer

from epmoe.engine.matcher import Grammars
from epmoe.errors import UserError
from epmoe.text.grammar import (
    JSON_OBJECT,
    Body,
    Tool,
    answer,
    check,
    of_choice,
    of_lark,
    of_regex,
    of_schema,
    vocabulary,
)  # fmt: skip
from epmoe.text.tokenizer import Tokenizer

VOCAB = 300
ENDS = ("<|return|>", "<|call|>", "<|endoftext|>")
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["a"],
    "additionalProperties": False,
}
TOWN = {"type": "object", "properties": {"town": {"type": "string", "maxLength": 5}}, "required": ["town"]}
TOOLS = [Tool("rain", TOWN | {"additionalProperties": False}), Tool("now.utc", {"type": "object", "properties": {}})]
BEGUN = "<|start|>user<|message|>x<|end|><|start|>assistant"
THINK = "<|channel|>analysis<|message|>hm, {2}<|end|><|start|>assistant"
FINAL = "<|channel|>final<|message|>"
CALL = "<|channel|>commentary to=functions.rain <|constrain|>json<|message|>"


@pytest.fixture(scope="module", params=[True, False], ids=["special", "only added"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Harmony's control tokens are what they are, whether the file calls them special or not."""
    return save_tokenizer(tmp_path_factory.mktemp("grammar") / "tokenizer.json", marked=request.param)


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(vocabulary(tokenizer, VOCAB, [id_of(tokenizer, name) for name in ENDS]))


def id_of(tokenizer: Tokenizer, name: str) -> int:
    id = tokenizer.tokenizer.token_to_id(name)
    assert id is not None
    return id


def accepted(tokenizer: Tokenizer, grammars: Grammars, grammar: str | None, text: str) -> tuple[int, bool]:
    """How many ids of a text a grammar takes, and whether it may end there."""
    assert grammar is not None
    matcher, word_GW = grammars.matcher(grammar), torch.zeros(1, -(-VOCAB // 32), dtype=torch.int32)
    ids = tokenizer.encode(text, special=False)
    for count, id in enumerate([*ids, id_of(tokenizer, "<|endoftext|>")]):
        grammars.fill([(matcher, ())], word_GW)
        assert not matcher.failure
        if not word_GW[0, id // 32] >> (id % 32) & 1:
            return count, False
        matcher.take(id)
    return len(ids), True


def whole(tokenizer: Tokenizer, grammars: Grammars, grammar: str | None, text: str) -> bool:
    return accepted(tokenizer, grammars, grammar, text) == (len(tokenizer.encode(text, special=False)), True)


RIGHT = [
    FINAL + '{"a":12}<|return|>',
    THINK + FINAL + '{"a": 7}<|return|>',
    THINK * 3 + '<|channel|>final <|constrain|>json<|message|>{\n  "a": 0\n}<|return|>',
    THINK + CALL + '{"town":"Ulm"}<|call|>',
    THINK + "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant" + CALL + '{"town":""}<|call|>',
    " to=functions.rain<|channel|>commentary json<|message|>" + '{"town": "Köln"}<|call|>',
    " to=functions.now.utc<|channel|>commentary<|message|>{}<|call|>",
]
WRONG = [
    (FINAL + "no", 2),
    (FINAL + '{"a":120', 1),
    (FINAL + '{"b"', 2),
    (FINAL + '{"a":1}<|end|>', 1),
    (FINAL + '{"a":1}<|call|>', 1),
    (THINK + "text", 4),
    (CALL + '{"town":"Ulmmmm', 1),
    (CALL + "{}", 1),
    (CALL + '{"town":"Ulm"}<|return|>', 1),
    ("<|channel|>commentary to=functions.sun", 3),
    ("<|channel|>analysis to=", 4),
    ("<|start|>", 1),
]


@pytest.mark.parametrize("number", range(len(RIGHT)))
def test_a_harmony_answer(tokenizer: Tokenizer, grammars: Grammars, number: int) -> None:
    """Thoughts, then the final message by the schema, or a call by its tool's; every form of header that is read."""
    grammar = answer(tokenizer, tokenizer.encode(BEGUN, special=False), of_schema(SCHEMA), TOOLS)
    assert whole(tokenizer, grammars, grammar, RIGHT[number])


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_what_a_harmony_answer_may_not_be(tokenizer: Tokenizer, grammars: Grammars, number: int) -> None:
    """Refused at the very token that is wrong: so many before the text's end."""
    text, left = WRONG[number]
    grammar = answer(tokenizer, tokenizer.encode(BEGUN, special=False), of_schema(SCHEMA), TOOLS)
    count = len(tokenizer.encode(text, special=False))
    assert accepted(tokenizer, grammars, grammar, text) == (count - left, False)


def test_letters_of_a_control_token_are_text(tokenizer: Tokenizer, grammars: Grammars) -> None:
    """`<|end|>` in letters ends no thought, and its token is no text."""
    grammar = answer(tokenizer, tokenizer.encode(BEGUN, special=False), of_schema(JSON_OBJECT))
    matcher, word_GW = grammars.matcher(grammar or ""), torch.zeros(1, -(-VOCAB // 32), dtype=torch.int32)
    for id in [*tokenizer.encode("<|channel|>analysis<|message|>", special=False), *b"<|end|><|start|>"]:
        grammars.fill([(matcher, ())], word_GW)
        assert word_GW[0, id // 32] >> (id % 32) & 1
        matcher.take(id)
    grammars.fill([(matcher, ())], word_GW)
    allowed = {name for name in CONTROLS if word_GW[0, (id := id_of(tokenizer, name)) // 32] >> (id % 32) & 1}
    assert allowed == {"<|end|>"}


CHOICES = {
    "auto": {FINAL + "Hello.<|return|>", CALL + '{"town":"Ulm"}<|call|>'},
    "required": {CALL + '{"town":"Ulm"}<|call|>', " to=functions.now.utc<|channel|>commentary<|message|>{}<|call|>"},
    "rain": {CALL + '{"town":"Ulm"}<|call|>'},
}


@pytest.mark.parametrize("choice", CHOICES)
def test_the_choice_of_tools(tokenizer: Tokenizer, grammars: Grammars, choice: str) -> None:
    grammar = answer(tokenizer, tokenizer.encode(BEGUN, special=False), None, TOOLS, choice)
    for text in set().union(*CHOICES.values()):
        right = text in CHOICES[choice] or (choice == "auto" and "utc" in text)
        assert whole(tokenizer, grammars, grammar, text) == right
        assert whole(tokenizer, grammars, grammar, THINK + text) == right


BODIES: dict[str, tuple[Body, str, str]] = {
    "schema": (of_schema(SCHEMA), '{"a":5}', "{}"),
    "object": (of_schema(JSON_OBJECT), '{"x": [1.5, {"y": null}]}', "[1]"),
    "regex": (of_regex("[a-c/]{2,3}"), "a/c", "abcd"),
    "choice": (of_choice(["yes", 'a "no"\\\n']), 'a "no"\\\n', 'a "no"'),
    "lark": (of_lark('start: "yes" | other\nother: "no" /[!?]/'), "no!", "no."),
}


@pytest.mark.parametrize("kind", BODIES)
def test_where_the_prompt_ends(tokenizer: Tokenizer, grammars: Grammars, kind: str) -> None:
    """After the role, before it, amid a thought, amid the answer; and without any markup."""
    body, right, wrong = BODIES[kind]
    places = {
        BEGUN: FINAL,
        BEGUN.removesuffix("assistant"): "assistant" + FINAL,
        BEGUN + "<|channel|>analysis<|message|>hm": "so<|end|><|start|>assistant" + FINAL,
        BEGUN + FINAL: "",
    }
    for prompt, begin in places.items():
        grammar = answer(tokenizer, tokenizer.encode(prompt, special=False), body)
        assert whole(tokenizer, grammars, grammar, f"{begin}{right}<|return|>"), prompt
        assert not whole(tokenizer, grammars, grammar, f"{begin}{wrong}<|return|>")
    plain = answer(tokenizer, tokenizer.encode("Hello", special=False), body)
    assert whole(tokenizer, grammars, plain, right) and not whole(tokenizer, grammars, plain, wrong)


def test_a_prompt_that_has_begun_a_call(tokenizer: Tokenizer, grammars: Grammars) -> None:
    grammar = answer(tokenizer, tokenizer.encode(BEGUN + CALL, special=False), None, TOOLS)
    assert whole(tokenizer, grammars, grammar, '{"town":"Ulm"}<|call|>')
    assert not whole(tokenizer, grammars, grammar, '{"town":7}<|call|>')


def test_without_harmony_the_answer_is_the_body(tmp_path: Path) -> None:
    """Of a vocabulary with holes, as some have."""
    words = {bytes([byte]): byte for byte in range(32, 127)}
    tokenizer = save_tokenizer(tmp_path / "tokenizer.json", words, {"<|endoftext|>": 299})
    grammars = Grammars(vocabulary(tokenizer, VOCAB, [299]))
    grammar = answer(tokenizer, tokenizer.encode("Hello", special=False), of_schema(SCHEMA), TOOLS)
    assert whole(tokenizer, grammars, grammar, '{"a":5}')
    with pytest.raises(UserError, match=r"^tool_choice='required' needs a prompt in harmony's markup"):
        answer(tokenizer, (), None, TOOLS, "required")


def test_holes_of_a_vocabulary_never_come(tmp_path: Path) -> None:
    """A hundred thousand: the ids of a synthetic checkpoint stand for bytes, and for control tokens far above."""
    count, end = 100_001, 100_000
    words = {bytes([byte]): byte for byte in range(256)}
    tokenizer = save_tokenizer(tmp_path / "tokenizer.json", words, {"<|endoftext|>": end})
    grammars = Grammars(vocabulary(tokenizer, count, [end]))
    masks = np.zeros((1, -(-count // 32)), dtype=np.int32)
    matcher = grammars.matcher(r"start: /(.|\n)*/")
    for letter in (None, *"ÿþ300".encode()):  # as what fills a hole is spelled, and as its letters are
        if letter is not None:
            matcher.take(letter)
        grammars.fill([(matcher, ())], torch.from_numpy(masks))
        allowed = np.flatnonzero(np.unpackbits(masks.view(np.uint8), bitorder="little"))
        assert len(allowed) and set(allowed) <= {*range(256), end}


def test_a_vocabulary_without_some_control_tokens(tmp_path: Path) -> None:
    """Neither <|constrain|> nor <|call|> nor <|return|>: the end of the text is the answer's."""
    names = ("<|endoftext|>", "<|start|>", "<|channel|>", "<|message|>", "<|end|>")
    controls = {name: 256 + place for place, name in enumerate(names)}
    tokenizer = save_tokenizer(tmp_path / "tokenizer.json", controls=controls)
    grammars = Grammars(vocabulary(tokenizer, VOCAB, [256]))
    grammar = answer(tokenizer, tokenizer.encode(BEGUN, special=False), of_schema(SCHEMA), TOOLS)
    for text in (THINK + FINAL + '{"a":5}', '<|channel|>commentary to=functions.rain json<|message|>{"town":""}'):
        assert whole(tokenizer, grammars, grammar, text)
    assert not whole(tokenizer, grammars, grammar, THINK)


def test_no_grammar_where_anything_is_right(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(BEGUN, special=False)
    assert answer(tokenizer, ids) is answer(tokenizer, ids, None, TOOLS, "none") is answer(tokenizer) is None


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a name": ({"tools": [Tool('a"b', {})]}, "^the tool's name 'a\"b' is none: "),
    "no tools": ({"choice": "required"}, "^tool_choice='required' without tools: "),
    "another name": ({"tools": TOOLS, "choice": "sun"}, r"^tool_choice='sun' is the name of no tool .*rain, now\.utc"),
    "a header": ({"prompt": BEGUN + "<|channel|>fin"}, "^the prompt ends amid a message's header: "),
    "another's turn": ({"prompt": "<|start|>user"}, "^the prompt ends amid a message's header: "),
    "no call": (
        {"prompt": BEGUN + FINAL, "tools": TOOLS, "choice": "required"},
        "^the prompt has begun a message that cannot be: ",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(tokenizer: Tokenizer, case: str) -> None:
    asked, message = REFUSED[case]
    prompt = tokenizer.encode(asked.get("prompt", BEGUN), special=False)
    with pytest.raises(UserError, match=message):
        answer(tokenizer, prompt, of_schema(SCHEMA), asked.get("tools", ()), asked.get("choice", "auto"))


@pytest.mark.parametrize("schema", [3, "x", None, True, {"a": {1, 2}}])
def test_what_is_no_schema_is_refused(schema: Any) -> None:
    with pytest.raises(UserError, match=r"^the JSON schema .*: "):
        of_schema(schema)


def test_what_cannot_be_compiled_shows_at_once() -> None:
    for body, _, _ in BODIES.values():
        check(body)
    for wrong in (of_schema({"type": "array", "uniqueItems": True}), of_regex("(a"), of_lark("start: (")):
        with pytest.raises(UserError, match=r"^the grammar is refused \(.*\): mend it$"):
            check(wrong)
    with pytest.raises(UserError, match=r"^there is nothing to choose from: "):
        of_choice([])


def test_a_schema_does_not_choose_how_strictly_it_is_read() -> None:
    """llguidance would ignore what it does not know, if the schema said so."""
    found = of_schema({"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}})
    assert "lenient" not in found["json_schema"]["x-guidance"]
    jsonschema.Draft202012Validator.check_schema(of_schema(SCHEMA)["json_schema"])
    assert json.loads(json.dumps(found)) == found
