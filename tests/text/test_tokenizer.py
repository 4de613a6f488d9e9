"""Tokenizer: a checkpoint's own files, in either spelling; what cannot be read is named."""

import json
from pathlib import Path

import pytest

from epmoe.errors import UserError
from epmoe.text.tokenizer import Tokenizer
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
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.of(Checkpoint.open(tmp_path))
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        Tokenizer.of(Checkpoint.open(tmp_path))
