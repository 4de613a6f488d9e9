"""A server whose model says what it is told: the real engine, service, door and HTTP process over a fake model."""

import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from fake_model import FakeCache, FakeModel
from harmony_cases import CONTROLS
from loading import rank_of
from scripted import SPECIAL, save_tokenizer

from epmoe.batch import Step
from epmoe.config.schema import Serve
from epmoe.engine.call import Stopped
from epmoe.engine.config import EngineConfig
from epmoe.engine.engine import Engine
from epmoe.engine.request import SamplingParams
from epmoe.engine.service import Service
from epmoe.ranks.control import Control
from epmoe.server.door import Door, listen
from epmoe.server.frames import Hello, Ready
from epmoe.text.chat import DEFAULT

NAMES = {name: 256 + place for place, name in enumerate((*SPECIAL, *CONTROLS))}
FIRST_WORD = 256 + len(NAMES)
POSITIONS = 20_000
WITHIN_S = 60
TEMPLATE = (
    "{%- if tools %}{{- '<|start|>developer<|message|>' + tools[0].function.name + '<|end|>' }}{%- endif %}"
    "{%- if reasoning_effort is defined %}{{- reasoning_effort }}{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|start|>' + message.role + '<|message|>' + (message.content or '') + '<|end|>' }}"
    "{%- endfor %}{{- '<|start|>assistant' }}"
)


def pieces(script: str) -> list[str]:
    """A script's tokens: control tokens, and words with the space before them."""
    return re.findall(r"<\|\w+\|>|[ \n]*[^ \n<]+|[ \n]+|<", script)


class Telling(FakeModel):
    """Answers the last message, of a user or a tool, with the script of its text, or with its own text.

    Args:
        pace_s: what a step of answers takes at least.
    """

    def __init__(self, file: Path, scripts: Mapping[str, str], pace_s: float) -> None:
        tokens = sorted({piece for script in scripts.values() for piece in pieces(script)} - NAMES.keys())
        self.ids = NAMES | {piece: FIRST_WORD + place for place, piece in enumerate(tokens)}
        words = {bytes([byte]): byte for byte in range(256)}
        words |= {piece.encode(): self.ids[piece] for piece in tokens if len(piece.encode()) > 1}
        self.ids |= {piece: ord(piece) for piece in tokens if len(piece.encode()) == 1}
        self.bytes = {id: word for word, id in words.items()} | {id: name.encode() for name, id in NAMES.items()}
        save_tokenizer(file, words, NAMES)
        super().__init__(vocab=FIRST_WORD + len(tokens), max_positions=POSITIONS)
        self.scripts, self.pace_s = scripts, pace_s

    def hidden(self, step: Step, cache: Any) -> torch.Tensor:
        time.sleep(self.pace_s)
        return super().hidden(step, cache)

    def logits(self, norm_O1: torch.Tensor, part: tuple[int, int] | None) -> torch.Tensor:
        logits_OV = torch.zeros(len(norm_O1), self.config.vocab)
        for row, number in enumerate(norm_O1[:, 0]):
            logits_OV[row, self.next(self.outputs[int(number)])] = 1000.0
        return logits_OV[:, slice(*part)] if part else logits_OV

    def next(self, history: list[int]) -> int:
        """The token after these."""
        said = b"".join(self.bytes.get(id, b"") for id in history).decode(errors="replace")
        *_, asked = re.finditer(r"<\|start\|>(?:user|tool)<\|message\|>(.*?)<\|end\|>", said, re.DOTALL)
        begun = "<|start|>assistant"
        script = self.scripts.get(asked[1], "<|channel|>final<|message|>" + asked[1] + "<|return|>")
        answer = said[said.index(begun, asked.end()) + len(begun) :]
        piece = next(iter(pieces(script[len(answer) :])), "<|return|>")
        return self.ids.get(piece, piece.encode()[0])


def run(service: Service, control: Control) -> None:
    try:
        service.run(control)
    except Exception as error:  # whoever waits hears of it
        service.fail(error)
        raise


@contextmanager
def told(folder: Path, scripts: Mapping[str, str], *, pace_s: float = 0.0, key: str = "") -> Iterator[str]:
    """The address of such a server, without a slash at its end.

    Args:
        scripts: the last message → the answer in harmony's markup, from what follows `<|start|>assistant` on.
        key: what clients must send.
    """
    model: Any = Telling(folder / "tokenizer.json", scripts, pace_s)
    cache: Any = FakeCache(tokens=POSITIONS, page=16)
    ends = [NAMES[name] for name in ("<|return|>", "<|call|>")]
    ranks = rank_of(0, 1)
    service = Service(Engine(model, cache, ranks, EngineConfig(eos_ids=ends, max_batch=4)), Serve())
    thread = threading.Thread(target=run, args=(service, Control(ranks, 20)), daemon=True)
    hello = Hello(
        model="scripted", release="0", created=0, vocab=model.config.vocab, max_positions=POSITIONS,
        tokenizer_file=str(folder / "tokenizer.json"), templates={DEFAULT: TEMPLATE}, special={}, chat="on",
        system=None, variables={}, defaults=asdict(SamplingParams(temperature=0.0)), queue_requests=8,
        most_requests=64, max_body=1_000_000, max_bodies=8_000_000, header_s=30.0, stalled_s=60.0, api_key=key, log="",
        responses=0,
    )  # fmt: skip
    with listen("127.0.0.1", 0) as listener:
        door = Door(hello, listener)
        thread.start()
        try:
            assert service.running.wait(WITHIN_S)
            door.open(service, Ready("told", POSITIONS))
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            service.stop(Stopped("over"))
            thread.join(WITHIN_S)
            door.close()
