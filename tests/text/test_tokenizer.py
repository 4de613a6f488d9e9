"""Tokenizer: a checkpoint's own files, in either spelling; what cannot be read is named."""

import json
from pathlib import Path

import pytest

from epmoe.errors import UserError, warn
from epmoe.text.tokenizer import Tokenizer, eos_ids
from epmoe.weights.checkpoint import Checkpoint
from epmoe.weights.synthetic import make_checkpoint


def test_a_checkpoints_own_template_and_special_tokens(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["bos_token"] = {"content": "<|startoftext|>", "lstrip": False}  # the other spelling
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}")
    tokenizer = Tokenizer.of(Checkpoint.open(tmp_path))
    assert tokenizer.chat is not None
    assert tokenizer.chat.render([{"content": "Hi"}]) == "<|startoftext|>Hi<|return|>"
    text = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.of(Checkpoint.open(tmp_path))
    (tmp_path / "tokenizer.json").write_text(text.replace('"vocab": {', '"vocab": {"A": 3, ', 1))
    with pytest.raises(UserError, match=r"tokenizer\.json cannot be read .*\(the key 'A' occurs twice\): download it"):
        Tokenizer.of(Checkpoint.open(tmp_path))
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        Tokenizer.of(Checkpoint.open(tmp_path))


def test_the_end_of_text_is_looked_for_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An empty list names none: generation_config.json, config.json, the tokenizer's own; then one line says it."""
    make_checkpoint(tmp_path)
    named = eos_ids(Checkpoint.open(tmp_path))

    def write(name: str, **changes: object) -> None:
        kept = json.loads((tmp_path / name).read_text())
        (tmp_path / name).write_text(json.dumps({**kept, **changes}))

    write("config.json", eos_token_id=7)
    assert eos_ids(Checkpoint.open(tmp_path)) == named != (7,)
    write("generation_config.json", eos_token_id=[])
    assert eos_ids(Checkpoint.open(tmp_path)) == (7,)
    write("config.json", eos_token_id=None)
    checkpoint = Checkpoint.open(tmp_path)
    assert eos_ids(checkpoint) == (Tokenizer.of(checkpoint).tokenizer.token_to_id("<|return|>"),)
    write("tokenizer_config.json", eos_token=None)
    warn.cache_clear()
    assert eos_ids(Checkpoint.open(tmp_path)) == ()
    assert capsys.readouterr().err.count("names no token that ends a text") == 1
