"""The loop: every request is answered as `generate` answers it, whenever it comes; times are in order."""

from collections.abc import Callable

import pytest
from spawn import run_ranks

from epmoe.bench.lengths import read_lengths
from epmoe.bench.load.arrivals import Arrivals, Concurrent, Poisson, Told
from epmoe.bench.load.schedule import requests_of, schedule
from epmoe.bench.load.serve import Served, serve
from epmoe.config.compose import from_keys
from epmoe.engine.request import Finished
from epmoe.llm import LLM
from epmoe.ranks.mesh import Ranks

DUE = schedule(14, 30.0, read_lengths("a", "uniform:1:40"), read_lengths("b", "uniform:1:9"), 2)


def served(ranks: Ranks, kind: str) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]], list[Served]]:
    """The ids of the answers, those of one `generate`, and the times."""
    llm = LLM.opened(from_keys({"checkpoint": "", "runtime": {"device": "cpu", "max_batch": 5}}), ranks)
    requests = requests_of(DUE, llm.architecture.vocab, 0)
    llm.load([request.cached(llm.architecture.max_positions) for request in requests])
    expected = [result.ids for result in llm.engine.generate(requests)]
    answers: dict[int, tuple[int, ...]] = {}
    step = llm.engine.step

    def recorded() -> list[object]:
        events = step()
        answers.update({event.id: event.result.ids for event in events if isinstance(event, Finished)})
        return list(events)

    llm.engine.step = recorded  # type: ignore[method-assign, assignment]
    arrivals: Arrivals = Concurrent(len(requests), 3)
    if kind == "poisson":
        arrivals = Poisson([due.at_s for due in DUE], Told(ranks, 60))
    found = serve(llm, requests, arrivals)
    assert not llm.engine.busy
    return [answers[id] for id in sorted(answers)], expected, found


@pytest.mark.parametrize("kind", ["poisson", "concurrent"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_request_is_answered(ranks: int, kind: str) -> None:
    for answers, expected, found in run_ranks(served, ranks, kind):
        assert answers == expected
        assert [len(each.token_s) for each in found] == [due.answer_tokens for due in DUE]
        assert all(each.first_s > 0 and min(each.between_s, default=1) >= 0 for each in found)
        due_s = [each.due_s for each in found]
        assert due_s == sorted(due_s) and (kind == "concurrent" or due_s == [due.at_s for due in DUE])


class Never:
    """Arrivals of which none comes before the last one has ended."""

    def __init__(self) -> None:
        self.left = 3

    def come(self, running: int, clock: Callable[[], float]) -> list[float]:
        if running or not self.left:
            return []
        self.left -= 1
        return [clock()]


def test_one_after_the_other() -> None:
    with LLM("", runtime={"device": "cpu"}) as llm:
        found = serve(llm, requests_of(DUE[:3], llm.architecture.vocab, 1), Never())
    ends = [each.token_s[-1] for each in found]
    assert all(end <= after.due_s for end, after in zip(ends, found[1:], strict=False)) and len(found) == 3
