"""Text ↔ token ids: tokenizer.json and what stands beside it."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from epmoe.errors import UserError
from epmoe.text.chat import ChatTemplate
from epmoe.text.markup import Markup
from epmoe.weights.checkpoint import Checkpoint


class Tokenizer:
    """tokenizer.json and what stands beside it.

    Raises:
        UserError: the checkpoint has no tokenizer.json, or one that cannot be read.
    """

    def __init__(self, file: Path, chat_template: str | None = None, special: Mapping[str, str] | None = None) -> None:
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"{file} cannot be read as a tokenizer ({error}): download it again") from error
        # Settings for training batches, which some checkpoints leave in the file.
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.chat = None if chat_template is None else ChatTemplate(chat_template, special or {})
        added = self.tokenizer.get_added_tokens_decoder()
        # Harmony's control tokens are special even where the file does not mark them so.
        self.harmony = Markup.of(self.tokenizer.token_to_id)
        controls = frozenset() if self.harmony is None else self.harmony.ids
        self.special_ids = controls | {id for id, token in added.items() if token.special}
        self.special_names = {self.tokenizer.id_to_token(id): id for id in self.special_ids | added.keys()}

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "Tokenizer":
        """The tokenizer of a checkpoint."""
        if checkpoint.tokenizer_file is None:
            raise UserError(f"checkpoint {checkpoint.path} has no tokenizer.json: download it beside the weights")
        return cls(checkpoint.tokenizer_file, checkpoint.chat_template, _special_tokens(checkpoint.tokenizer_config))

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Token ids; `special` lets the tokenizer add what it puts around a plain text. A template brings its own.

        Raises:
            UserError: half of a surrogate pair, which JSON's \\u escapes can spell and no text encoding can.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the text has a lone surrogate (character {error.start}): remove it") from error
        return self.tokenizer.encode(text, add_special_tokens=special).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids as they are, special tokens included."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """{bos_token: text, …} of tokenizer_config.json; a token stands there as text or as an object with `content`."""
    found = {}
    for name in ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"):
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            found[name] = token
    return found


def eos_ids(checkpoint: Checkpoint) -> tuple[int, ...]:
    """Ids that end a text: eos_token_id, a number or a list, of generation_config.json, else of config.json."""
    for name, config in (("generation_config", checkpoint.generation_config), ("config", checkpoint.config)):
        value = config.get("eos_token_id")
        ids = value if isinstance(value, list) else [value]
        if not all(type(each) is int for each in ids) and value is not None:
            raise UserError(f"{checkpoint.path}/{name}.json: eos_token_id={value!r} is neither an id nor a list of ids")
        if value is not None:
            return tuple(ids)
    return ()
