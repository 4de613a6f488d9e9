"""Chat templates and special tokens of a checkpoint, from all the files that transformers' tokenizers read.

chat_template.jinja                     the template named "default"
additional_chat_templates/NAME.jinja    more of them, by name
tokenizer_config.json: chat_template    only where there is none of these files; text, or a list of {name, template}
chat_template.json: chat_template       only where there is none of all these; likewise (a processor's file)

tokenizer_config.json                   bos_token, …; any other named `…_token`; extra_special_tokens by name
special_tokens_map.json                 wins over it for bos_token and the like, and where extra tokens have names;
                                        not read where tokenizer_config.json has an added_tokens_decoder
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epmoe.errors import UserError
from epmoe.text.chat import DEFAULT, ChatTemplate

if TYPE_CHECKING:  # it brings torch, which text does without
    from epmoe.weights.checkpoint import Checkpoint

_STANDARD = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def chat_of(checkpoint: "Checkpoint") -> ChatTemplate | None:
    """The checkpoint's chat template, if it has one.

    Raises:
        UserError: one of the files above is not what it should be, or the template is no valid jinja.
    """
    sources = chat_sources(checkpoint)
    return ChatTemplate(sources, special_tokens(checkpoint)) if sources else None


def chat_sources(checkpoint: "Checkpoint") -> dict[str, str]:
    """The sources of the chat templates by name; empty if there is none."""
    path = checkpoint.path
    found = {}
    if (file := path / "chat_template.jinja").is_file():
        found[DEFAULT] = _text(file)
    for file in sorted((path / "additional_chat_templates").glob("*.jinja")):
        found[file.name.removesuffix(".jinja")] = _text(file)
    for name in ("tokenizer_config.json", "chat_template.json"):
        if not found:
            config = checkpoint.tokenizer_config if name == "tokenizer_config.json" else checkpoint.json(name)
            found = _listed(path / name, config.get("chat_template"))
    return found


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read as UTF-8 text ({error}): download it again, or use chat=off") from error


def _listed(file: Path, value: Any) -> dict[str, str]:
    """The entry `chat_template` of a JSON file."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {DEFAULT: value}
    if isinstance(value, list) and all(isinstance(each, dict) for each in value):
        named = [(each.get("name"), each.get("template")) for each in value]
        if all(isinstance(name, str) and isinstance(template, str) for name, template in named):
            return {str(name): str(template) for name, template in named}
    raise UserError(
        f"{file}: chat_template is neither text nor a list of objects with a name and a template: "
        "download it again, or use chat=off"
    )


def special_tokens(checkpoint: "Checkpoint") -> dict[str, str]:
    """{bos_token: text, …}: what templates may use as variables."""
    config = checkpoint.tokenizer_config
    more = {} if "added_tokens_decoder" in config else checkpoint.json("special_tokens_map.json")
    standard = _tokens({name: value for name, value in {**config, **more}.items() if name in _STANDARD})
    listed = config.get("extra_special_tokens") or config.get("additional_special_tokens")
    return standard | _own(more) | _own(config) | _by_name(listed) | _by_name(more.get("extra_special_tokens"))


def _own(config: Mapping[str, Any]) -> dict[str, str]:
    """Tokens that a model has names of its own for."""
    return _tokens({name: each for name, each in config.items() if name.endswith("_token") and name not in _STANDARD})


def _by_name(extra: Any) -> dict[str, str]:
    """Extra tokens; those in a list have no names."""
    return _tokens(extra) if isinstance(extra, dict) else {}


def _tokens(values: Mapping[str, Any]) -> dict[str, str]:
    """A token stands there as text or as an object with `content`."""
    contents = {name: each.get("content") if isinstance(each, dict) else each for name, each in values.items()}
    return {name: content for name, content in contents.items() if isinstance(content, str)}
