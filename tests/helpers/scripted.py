"""Tokenizers whose first 256 ids are the bytes, and checkpoints that say what a test wants."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from harmony_cases import CONTROLS
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Library

from epmoe.text.tokenizer import Tokenizer
from epmoe.weights.synthetic import make_checkpoint

SPECIAL = ("<|startoftext|>", "<|endoftext|>")
ENDS = ("<|return|>", "<|call|>", "<|endoftext|>")  # of a text
VOCAB = 352
TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|start|>' + message['role'] + '<|message|>' + message['content'] + '<|end|>' }}"
    "{%- endfor %}{{- '<|start|>assistant' }}"
)


# Byte-level BPE writes these bytes as themselves, the others as 256, 257, ...
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
LETTERS = [chr(byte if byte in PRINTABLE else 256 + OTHERS.index(byte)) for byte in range(256)]


def letters(data: bytes) -> str:
    """Bytes as byte-level BPE writes them."""
    return "".join(LETTERS[byte] for byte in data)


def save_tokenizer(
    file: Path,
    words: Mapping[bytes, int] | None = None,
    controls: Mapping[str, int] | None = None,
    *,
    marked: bool = True,
) -> Tokenizer:
    """Write a byte-level tokenizer without merges, and read it.

    Args:
        words: bytes → id; None: the single bytes.
        controls: added tokens → id; None: two special ones and harmony's, from 256 on.
        marked: harmony's are special, not only added.
    """
    words = {bytes([byte]): byte for byte in range(256)} if words is None else words
    if controls is None:
        controls = {name: 256 + place for place, name in enumerate((*SPECIAL, *CONTROLS))}
    vocab = {letters(word): id for word, id in words.items()} | dict(controls)
    tokenizer = Library(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    for name in sorted(controls, key=lambda name: controls[name]):
        special = name in SPECIAL or (marked and name in CONTROLS)
        token = AddedToken(name, normalized=False, special=special)
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([token])
    tokenizer.save(str(file))
    return Tokenizer(file)


def rambling(path: Path) -> Path:
    """A checkpoint with random weights, bytes and harmony's control tokens for a vocabulary."""
    make_checkpoint(path, vocab=VOCAB, layers=2, experts=4, top_k=2)
    tokenizer = save_tokenizer(path / "tokenizer.json")
    (path / "chat_template.jinja").write_text(TEMPLATE)
    ends = [tokenizer.tokenizer.token_to_id(name) for name in ENDS]
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return path


def scripted(path: Path, chain: Sequence[str], *, marked: bool = True) -> Path:
    """A checkpoint that says after chain[i] chain[i + 1]: tokens, of which no two may be the same.

    A Markov chain: embeddings are one-hot, the layers add nothing, the vocabulary's rows lead to the next token. Texts
    of more than a byte become tokens. <|return|>, <|call|> and <|endoftext|> end a text.
    """
    make_checkpoint(path, layers=1, hidden=VOCAB, intermediate=32, experts=2, top_k=1, heads=2, vocab=VOCAB)
    names = {name: 256 + place for place, name in enumerate((*SPECIAL, *CONTROLS))}
    own = {word: 256 + len(names) + place for place, word in enumerate(each for each in chain if each not in names)}
    words = {bytes([byte]): byte for byte in range(256)} | {word.encode(): id for word, id in own.items() if word[1:]}
    save_tokenizer(path / "tokenizer.json", words, names, marked=marked)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    ends = [names[name] for name in ENDS]
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    ids = [names[each] if each in names else own[each] if each[1:] else ord(each) for each in chain]
    tensors = load_file(path / "model.safetensors")
    for name, tensor in tensors.items():
        if "norm" not in name and not name.endswith("sinks"):
            tensor.zero_()
    head = torch.zeros(VOCAB, VOCAB)
    head[ids[1:], ids[:-1]] = 8.0
    tensors |= {"model.embed_tokens.weight": torch.eye(VOCAB).bfloat16(), "lm_head.weight": head.bfloat16()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path
