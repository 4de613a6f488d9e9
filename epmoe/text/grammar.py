"""Grammars of answers, from a JSON schema, a regular expression or Lark, and from the tools that may be called.

A template without harmony's markup: the answer is what the body says. With it one grammar holds the whole answer, so
that what is thought stays free:

    (<|channel|>analysis<|message|> text <|end|><|start|>assistant)*        … and commentary, where there are tools
    <|channel|>final<|message|> body <|return|>                             or a call:
    <|channel|>commentary to=functions.NAME <|constrain|>json<|message|> arguments <|call|>

Harmony ends a turn with its first call, so there is one at most. Control tokens are tokens here, never their letters.
What comes out is a text for `SamplingParams.grammar`; engine/matcher.py runs it.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llguidance import LLMatcher, LLTokenizer

from epmoe.engine.matcher import check_grammar
from epmoe.errors import UserError
from epmoe.text.harmony import Messages
from epmoe.text.tokenizer import Tokenizer

Body = Mapping[str, Any]  # an entry of llguidance's list of grammars
# Between the parts of a JSON: nothing, a space, or a line break and some of them. Bounded, so that a bounded schema has
# no answer without an end.
SPACE = r"( |\n( {0,16}|\t{0,8}))?"
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
NOBODYS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}  # an added token
JSON_OBJECT: Mapping[str, Any] = {"type": "object"}


@dataclass(frozen=True)
class Tool:
    """What may be called, and the JSON schema that its arguments obey."""

    name: str
    parameters: Mapping[str, Any]


def of_schema(schema: Mapping[str, Any]) -> Body:
    """A JSON that obeys a schema; `of_schema(JSON_OBJECT)` any object. References within the schema alone are followed.

    Raises:
        UserError: it is no object, or JSON cannot hold it. What llguidance does not know of it is refused when it is
            compiled, never left out.
    """
    if not isinstance(schema, Mapping):
        raise UserError(f"the JSON schema {schema!r} is no object: give one such as {{'type': 'object'}}")
    own = {name: value for name, value in schema.items() if name != "x-guidance"}  # those would be llguidance's options
    try:
        text = LLMatcher.grammar_from_json_schema(json.dumps(own), overrides={"whitespace_pattern": SPACE})
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"the JSON schema cannot be written as JSON ({error}): correct it") from error
    return {"json_schema": json.loads(text)["grammars"][0]["json_schema"]}


def of_regex(pattern: str) -> Body:
    """A text that a regular expression matches as a whole, without look-around."""
    text = LLMatcher.grammar_from_regex(pattern)
    return {"lark_grammar": json.loads(text)["grammars"][0]["lark_grammar"]}


def of_lark(grammar: str) -> Body:
    """A text of a context-free grammar, in Lark's notation as llguidance reads it; it begins with `start`."""
    return {"lark_grammar": grammar}


def of_choice(texts: Sequence[str]) -> Body:
    """One of these texts.

    Raises:
        UserError: there are none.
    """
    if not texts:
        raise UserError("there is nothing to choose from: give a text at least")
    return of_lark(f"start: {' | '.join(map(json.dumps, texts))}")


def check(body: Body) -> None:
    """Raises UserError for one that is refused when it is compiled, as far as that shows without a vocabulary."""
    check_grammar(_serialised([("answer", body)]))


def answer(
    tokenizer: Tokenizer,
    prompt: Sequence[int] = (),
    body: Body | None = None,
    tools: Sequence[Tool] = (),
    choice: str = "auto",
) -> str | None:
    """The grammar of an answer; None where it may be anything.

    Args:
        prompt: the ids before it: a template ends within a header, a prompt of one's own perhaps within a message.
        body: of the answer to the user; None: any text.
        tools: that may be called.
        choice: "auto"; "none", of them; "required", one of them; or the name of one.
    Raises:
        UserError: a choice that cannot be, a tool without a proper name, a prompt that ends amid a header.
    """
    calls = _chosen(tools, choice)
    needed = choice not in ("auto", "none")
    place = Messages(tokenizer, prompt)
    if place.markup is None or not (place.open or place.header is not None):
        if needed:
            raise UserError(f"tool_choice={choice!r} needs a prompt in harmony's markup: take tool_choice=auto")
        return None if body is None else _serialised([("answer", body)])
    if body is None and not calls:
        return None
    return _Harmony(tokenizer, body, calls, final=not needed).grammar(place)


def vocabulary(tokenizer: Tokenizer, vocab: int, eos_ids: Sequence[int]) -> LLTokenizer:
    """What a matcher must know of the ids from 0 to vocab - 1: their bytes, which are special, which end a text.

    Of gpt-oss's 200,000 it takes a second or more.

    Raises:
        UserError: a tokenizer.json of a kind that llguidance does not know.
    """
    table = json.loads(tokenizer.tokenizer.to_str())
    added, known = table["added_tokens"], tokenizer.tokenizer.get_vocab(with_added_tokens=True)
    for token in added:
        token["special"] = token["id"] in tokenizer.special_ids
    # llguidance counts the ids, and so takes them to have no holes. What fills one must stand in no text: in a
    # vocabulary of bytes it begins with 0xFF, elsewhere it is an added token, of which many take minutes to read.
    of_bytes = (table["decoder"] or {}).get("type") == "ByteLevel"
    for id in set(range(max(known.values()))).difference(known.values()):
        name = f"ÿþ{id}" if of_bytes else f"<|nobody's {id}|>"
        table["model"]["vocab"][name] = id
        if not of_bytes:
            added.append({**NOBODYS, "id": id, "content": name})
    try:
        return LLTokenizer(json.dumps(table), n_vocab=vocab, eos_token=[id for id in eos_ids if id < vocab])
    except (TypeError, ValueError) as error:
        first = str(error).split("\n", 1)[0]
        raise UserError(f"no grammar works with the checkpoint's tokenizer.json ({first}): ask without one") from error


def _chosen(tools: Sequence[Tool], choice: str) -> list[Tool]:
    """Those that may be called."""
    for tool in tools:
        if not NAME.fullmatch(tool.name):
            raise UserError(f"the tool's name {tool.name!r} is none: take up to 64 letters, digits, _, . or -")
    if choice == "none":
        return []
    if choice in ("auto", "required"):
        if choice == "required" and not tools:
            raise UserError("tool_choice='required' without tools: give some, or tool_choice=auto")
        return list(tools)
    found = [tool for tool in tools if tool.name == choice]
    if not found:
        known = ", ".join(tool.name for tool in tools) or "none"
        raise UserError(f"tool_choice={choice!r} is the name of no tool (there are: {known}): name one of these")
    return found


def _serialised(grammars: Sequence[tuple[str, Body]]) -> str:
    return json.dumps({"grammars": [{"name": name, **body} for name, body in grammars]})


class _Harmony:
    """The grammar of a turn. `final`: it may end with an answer to the user, not only with a call."""

    def __init__(self, tokenizer: Tokenizer, body: Body | None, calls: Sequence[Tool], *, final: bool) -> None:
        self.token_id, self.body, self.calls, self.final = tokenizer.tokenizer.token_to_id, body, calls, final

    def grammar(self, place: Messages) -> str:
        """From where the prompt has ended."""
        rules = "\n".join([f"start: {self._start(place)}", *self._rules()])
        others = [] if self.body is None else [("body", self.body)]
        others += [(f"arguments_{number}", of_schema(each.parameters)) for number, each in enumerate(self.calls)]
        return _serialised([("answer", {"lark_grammar": rules}), *others])

    def _start(self, place: Messages) -> str:
        if place.header is not None:
            if place.header or place.role not in (None, "assistant"):
                raise UserError("the prompt ends amid a message's header: end it after <|start|>assistant")
            return "turn" if place.role else '"assistant" turn'
        header = place.drafts[-1].header
        if header.is_answer and self.final:
            return "final_body"
        number = next((n for n, each in enumerate(self.calls) if header.recipient == f"functions.{each.name}"), None)
        if number is not None:
            return f"call_body_{number}"
        if header.is_answer or header.recipient:
            raise UserError("the prompt has begun a message that cannot be: end it after <|start|>assistant")
        return "free turn"

    def _rules(self) -> Iterator[str]:
        channel, message = self._token("channel"), self._token("message")
        thoughts = "analysis | commentary" if self.calls else "analysis"
        lasts = [*(["final"] if self.final else []), *(f"call_{number}" for number in range(len(self.calls)))]
        yield f"turn: ({thoughts})* ({' | '.join(lasts)})"
        yield f'analysis: {channel} "analysis" {message} free'
        yield f'commentary: {channel} "commentary" {message} free'
        yield f'free: TEXT {self._token("end")} {self._token("start")} "assistant"'
        yield "TEXT: /(.|\\n)*/"
        constrain = f'" "? {self._token("constrain")} "json"' if self._token("constrain") else '""'
        if self.final:
            # Without <|constrain|> readers take `final json` for a recipient.
            kind = f"({constrain})?" if self.body and "json_schema" in self.body else ""
            yield f'final: {channel} "final" {kind} {message} final_body'
            yield f"final_body: {'TEXT' if self.body is None else '@body'} {self._token('return')}"
        yield f'kind: (" json" | {constrain})?'
        for number, each in enumerate(self.calls):
            to = json.dumps(f" to=functions.{each.name}")
            headers = f'{channel} "commentary" {to} kind | {to} {channel} "commentary" kind'
            yield f"call_{number}: ({headers}) {message} call_body_{number}"
            yield f"call_body_{number}: @arguments_{number} {self._token('call')}"

    def _token(self, name: str) -> str:
        """As a grammar names it; nothing where the vocabulary has none."""
        id = self.token_id(f"<|{name}|>")
        return "" if id is None else f"<[{id}]>"
