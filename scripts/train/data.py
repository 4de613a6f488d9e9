"""The corpus as tokens, its fixed held-out part, the tokenizer, and the checks on generated text.

Letters: B windows · S tokens of a window.
"""

import json
import lzma
import random
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

CORPUS = Path(__file__).resolve().parent / "corpus.txt.xz"
START, END = "<|startoftext|>", "<|endoftext|>"
CHUNK_CHARACTERS = 2000  # a chunk is the fewest paragraphs that reach this
HELD_OUT_EVERY = 50  # of 50 neighbouring chunks, the middle one is held out

# A model that continues text: the messages' contents as they are, a blank line between them, and no roles.
CHAT_TEMPLATE = (
    "{{- bos_token }}\n"
    "{%- for message in messages %}\n"
    "    {{- message['content'] }}\n"
    "    {%- if not loop.last %}{{- '\\n\\n' }}{%- endif %}\n"
    "{%- endfor %}\n"
)


def read_corpus() -> list[str]:
    """The corpus' documents: paragraphs, a line each."""
    return lzma.decompress(CORPUS.read_bytes()).decode().removesuffix("\n").split("\n\f\n")


def split(documents: list[str]) -> tuple[list[str], list[str]]:
    """(training documents, held-out chunks). A document out of whose middle a chunk was taken becomes two."""
    train, held_out = [], []
    number = 0
    for document in documents:
        kept: list[str] = []
        for chunk in _chunks(document):
            number += 1
            if number % HELD_OUT_EVERY == HELD_OUT_EVERY // 2:
                held_out.append(chunk)
                if kept:
                    train.append("\n".join(kept))
                kept = []
            else:
                kept.append(chunk)
        if kept:
            train.append("\n".join(kept))
    return train, held_out


def _chunks(document: str) -> Iterator[str]:
    chunk: list[str] = []
    for paragraph in document.split("\n"):
        chunk.append(paragraph)
        if sum(map(len, chunk)) >= CHUNK_CHARACTERS:
            yield "\n".join(chunk)
            chunk = []
    if chunk:
        yield "\n".join(chunk)


def train_tokenizer(documents: list[str], vocab: int) -> Tokenizer:
    """Byte-level BPE of exactly `vocab` tokens; 0 and 1 are START and END. Encoding puts START before a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    assert tokenizer.get_vocab_size() == vocab, f"the text is too short for {vocab} tokens"
    start = (START, tokenizer.token_to_id(START))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{START} $A", special_tokens=[start])
    return tokenizer


def special_ids(tokenizer: Tokenizer) -> tuple[int, int]:
    """The ids of START and END."""
    return tokenizer.encode(START, add_special_tokens=False).ids[0], tokenizer.encode(
        END, add_special_tokens=False
    ).ids[0]


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """tokenizer.json, tokenizer_config.json and chat_template.jinja, as Hugging Face loads them."""
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": START,
        "eos_token": END,
        "pad_token": END,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def encode(tokenizer: Tokenizer, documents: list[str]) -> list[Tensor]:
    """Each document as int64 ids between START and END."""
    _, end = special_ids(tokenizer)
    return [torch.tensor([*found.ids, end]) for found in tokenizer.encode_batch_fast(documents)]


def held_out_windows(tokenizer: Tokenizer, length: int, count: int | None = None) -> Tensor:
    """int64 [B, S+1]: the held-out chunks joined and cut, without overlap; `count` of them spread evenly, or all.

    A window's loss is over its last S tokens.
    """
    ids = torch.cat(encode(tokenizer, split(read_corpus())[1]))
    windows_BS = ids[: len(ids) // (length + 1) * (length + 1)].view(-1, length + 1)
    if count is None:
        return windows_BS
    return windows_BS[torch.linspace(0, len(windows_BS) - 1, count).long()]


def epoch(documents: list[Tensor], length: int, rng: random.Random) -> Tensor:
    """int64 [B, S+1]: all documents in a new order, joined and cut at a new offset; windows in a new order."""
    order = rng.sample(range(len(documents)), len(documents))
    ids = torch.cat([documents[i] for i in order])[rng.randrange(length) :]
    windows_BS = ids[: (len(ids) - 1) // length * length + 1].unfold(0, length + 1, length)
    return windows_BS[torch.tensor(rng.sample(range(len(windows_BS)), len(windows_BS)))]


def words(text: str) -> list[str]:
    """Runs of letters, lower case; an apostrophe inside belongs to its word."""
    return re.findall(r"[a-z]+(?:'[a-z]+)*", text.lower())


class TextCheck:
    """Is generated text English of the corpus, and not a copy of it?"""

    def __init__(self) -> None:
        corpus = [words(document) for document in read_corpus()]
        self.vocabulary = frozenset(word for document in corpus for word in document)
        joined = " | ".join(" ".join(document) for document in corpus)  # the bar keeps runs inside a document
        self.text = f" {joined} "

    def known(self, text: str) -> float:
        """The share of the text's words that occur in the corpus."""
        found = words(text)
        return sum(word in self.vocabulary for word in found) / len(found)

    def longest_copy(self, text: str) -> int:
        """Words of the longest run of the text that stands in the corpus too."""
        found, longest = words(text), 0
        for start in range(len(found)):
            while start + longest < len(found) and f" {' '.join(found[start : start + longest + 1])} " in self.text:
                longest += 1
        return longest
