"""Text ↔ token ids: tokenizer.json and what stands beside it."""

import os
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import tokenizers

from epmoe import strictjson
from epmoe.errors import UserError, warn
from epmoe.text.chat import ChatTemplate
from epmoe.text.chat_files import chat_of, special_tokens
from epmoe.text.markup import Markup
from epmoe.text.panics import guarded, refused
from epmoe.text.spelling import Spelling

# One text at a time is all that is asked here; where threads may have been used a fork says so on standard error.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

if TYPE_CHECKING:  # it brings torch, which text does without
    from epmoe.weights.checkpoint import Checkpoint


class Tokenizer:
    """tokenizer.json and what stands beside it.

    Raises:
        UserError: the checkpoint has no tokenizer.json, or one that cannot be read.
    """

    def __init__(
        self, file: Path, chat_template: str | Mapping[str, str] | None = None, special: Mapping[str, str] | None = None
    ) -> None:
        self._make_chat = lambda: None if chat_template is None else ChatTemplate(chat_template, special or {})
        _check_json(file)
        with guarded(f"{file} cannot be read as a tokenizer", "download it again"):
            self.tokenizer = tokenizers.Tokenizer.from_file(str(file))
            # Settings for training batches, which some checkpoints leave in the file.
            self.tokenizer.no_padding()
            self.tokenizer.no_truncation()
            self.spelling = Spelling(self.tokenizer)
            added = self.tokenizer.get_added_tokens_decoder()
            # Harmony's control tokens are special even where the file does not mark them so.
            self.harmony = Markup.of(self.tokenizer.token_to_id)
            controls = frozenset() if self.harmony is None else self.harmony.ids
            self.special_ids = controls | {id for id, token in added.items() if token.special}
            self.special_names = {self.tokenizer.id_to_token(id): id for id in self.special_ids | added.keys()}
            # A decoder that fails does so here, where no trace is printed.
            self.tokenizer.decode(list(range(self.tokenizer.get_vocab_size())), skip_special_tokens=False)

    @classmethod
    def of(cls, checkpoint: "Checkpoint") -> "Tokenizer":
        """The tokenizer of a checkpoint."""
        if checkpoint.tokenizer_file is None:
            raise UserError(f"checkpoint {checkpoint.path} has no tokenizer.json: download it beside the weights")
        made = cls(checkpoint.tokenizer_file)
        made._make_chat = lambda: chat_of(checkpoint)
        return made

    @cached_property
    def chat(self) -> ChatTemplate | None:
        """The chat template, if there is one.

        Raises:
            UserError: it is broken; who needs none may go on.
        """
        return self._make_chat()

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Token ids; `special` lets the tokenizer add what it puts around a plain text. A template brings its own.

        Raises:
            UserError: half of a surrogate pair, which JSON's \\u escapes can spell and no text encoding can; or a
                character that the vocabulary has no token for.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the text has a lone surrogate (character {error.start}): remove it") from error
        with guarded("the tokenizer cannot encode the text", "change it, or the tokenizer"):
            # As a batch of one: `encode` would hold Python's lock, a second for each megabyte.
            (encoded,) = self.tokenizer.encode_batch([text], add_special_tokens=special)
            self.spelling.check(text, encoded)
            return encoded.ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids as they are, special tokens included.

        Raises:
            UserError: the tokenizer's decoder fails, although it could decode every id once.
        """
        try:
            return self.tokenizer.decode(list(ids), skip_special_tokens=False)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            raise refused(error, "the tokenizer cannot decode the answer", "take the model's own tokenizer") from error


def _check_json(file: Path) -> None:
    """Raises UserError for a file that is no JSON; the library takes the last of two equal keys."""
    try:
        strictjson.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        said = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{file} cannot be read as a tokenizer ({said}): download it again") from error


def eos_ids(checkpoint: "Checkpoint") -> tuple[int, ...]:
    """Ids that end a text: eos_token_id, a number or a list, of generation_config.json, else of config.json, else the
    tokenizer's eos_token. Where none is named, one line says so.
    """
    for name, config in (("generation_config", checkpoint.generation_config), ("config", checkpoint.config)):
        value = config.get("eos_token_id")
        ids = value if isinstance(value, list) else [value]
        if not all(type(each) is int for each in ids) and value is not None:
            raise UserError(f"{checkpoint.path}/{name}.json: eos_token_id={value!r} is neither an id nor a list of ids")
        if value not in (None, []):
            return tuple(ids)
    if checkpoint.tokenizer_file is not None:
        token = special_tokens(checkpoint).get("eos_token")
        id = None if token is None else Tokenizer.of(checkpoint).tokenizer.token_to_id(token)
        if id is not None:
            return (id,)
    warn(
        f"{checkpoint.path} names no token that ends a text (eos_token_id in generation_config.json or config.json): "
        "every answer has max_new_tokens"
    )
    return ()
