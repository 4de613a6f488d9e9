"""Mixed steps on an engine with a clock of the test's own: what is counted as first, between and bare."""

import time
from dataclasses import dataclass, field
from typing import Any

import pytest

from epmoe.bench import mixed
from epmoe.bench.mixed import Watched, decoded_tokens, measure_mixed
from epmoe.engine.request import Event, Finished, Request, Result, SamplingParams, Token
from epmoe.errors import UserError
from epmoe.llm import LLM

BARE_S, PIECE_S, PIECE = 1.0, 10.0, 4  # a step without a prompt, what up to four tokens of one add to it


@dataclass
class Clocked:
    """An engine whose steps take what they hold, and which cuts prompts into pieces of four tokens."""

    now: float = 0.0
    reason: str = "length"
    left: dict[int, int] = field(default_factory=dict)  # tokens of the prompt, by request
    wanted: dict[int, int] = field(default_factory=dict)

    def add(self, request: Request) -> int:
        id = len(self.left)
        self.left[id], self.wanted[id] = len(request.ids), request.params.max_new_tokens or 0
        return id

    def step(self) -> list[Event]:
        entering = next((id for id, left in self.left.items() if left), None)
        decoding = [id for id, left in self.left.items() if not left and self.wanted[id]]
        self.now += BARE_S + (PIECE_S if entering is not None else 0)
        if entering is not None:
            self.left[entering] -= min(PIECE, self.left[entering])
            decoding += [] if self.left[entering] else [entering]
        events: list[Event] = []
        for id in decoding:
            self.wanted[id] -= 1
            events.append(Token(id, 1, None))
            if not self.wanted[id]:
                events.append(Finished(id, Result((1,), self.reason, 0, 0, ())))
        return events


@pytest.fixture
def clocked(monkeypatch: pytest.MonkeyPatch) -> Clocked:
    engine = Clocked()
    monkeypatch.setattr(mixed.time, "perf_counter", lambda: engine.now)
    return engine


def request(tokens: int, new: int) -> Request:
    return Request((0,) * tokens, SamplingParams(max_new_tokens=new))


def test_a_prompt_of_two_pieces_among_three(clocked: Any) -> None:
    watched = Watched(clocked)
    for _ in range(3):
        clocked.add(request(4, 100))
    while len(watched.come_s) < 3:
        watched.step()
    assert watched.step() == [BARE_S] * 3
    first_s, steps, between_s = watched.enter(request(7, 1))
    assert (first_s, steps, between_s) == (2 * (BARE_S + PIECE_S), 2, BARE_S + PIECE_S)
    assert watched.step() == [BARE_S] * 3


def test_a_model_without_numbers_ends_it(clocked: Any) -> None:
    clocked.reason = "error"
    with pytest.raises(UserError, match="not finite"):
        Watched(clocked).enter(request(4, 1))


@pytest.mark.parametrize("tokens", [1, pytest.param(40, marks=pytest.mark.slow), 300])
def test_with_the_embedded_model(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixed.time, "perf_counter", time.process_time)  # so that other processes do not count
    with LLM("", runtime={"device": "cpu", "prefill_chunk": 256, "max_batch": 4}) as llm:
        row = measure_mixed(llm, (3, tokens), 5, samples=2)
        assert not llm.engine.busy
    steps = 2 if tokens > 256 else 1
    assert (row["sequences"], row["tokens"], row["steps"]) == (3, tokens, steps + 1)  # it is read a step later
    assert row["bare_ms"] > 0 and row["best_first_ms"] <= row["first_ms"]
    assert row["between_ms"] > (row["bare_ms"] if tokens == 300 else 0)  # of a short prompt it may be either


def test_others_decode_longer_than_the_run() -> None:
    assert decoded_tokens(448, 15) > 16 * (2 + 8 + 2)
