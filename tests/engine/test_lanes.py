"""Requests of their own for each rank: which rank gets which, and steps that all ranks make together.

The choices are tried on the host alone; the engine on a fake model, whose ranks compare the sizes of every step, and
whose cache checks what is read and written.
"""

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from drafting import draft_wrongly, try_some
from fake_model import EOS, VOCAB, FakeCache, FakeModel, expected, outputs
from fake_words import vocabulary
from loading import rank_of
from spawn import run_ranks

from epmoe.cache.pages import Pages
from epmoe.engine.config import EngineConfig
from epmoe.engine.diagnose import NotFinite
from epmoe.engine.drafts import Costs
from epmoe.engine.engine import Engine
from epmoe.engine.graphs import Kind
from epmoe.engine.lanes import ANSWER, Lanes
from epmoe.engine.request import Finished, Request, Result, SamplingParams, Workload
from epmoe.engine.scheduler import Scheduler
from epmoe.engine.sequence import Sequence as Running
from epmoe.ranks.mesh import Ranks

PAGE = 4


def lanes(count: int, own: int = 0, tokens: int = 2000, max_batch: int = 8) -> Lanes:
    every = [Pages({None: tokens // PAGE}, PAGE, 64, most=tokens) for _ in range(count)]
    return Lanes([Scheduler(each, 2000, [EOS], max_batch=max_batch, prefill_chunk=64) for each in every], own)


def asked(ids: Sequence[int], new: int = 10, priority: int = 0) -> Request:
    return Request(tuple(ids), SamplingParams(max_new_tokens=new, ignore_eos=True), priority=priority)


def run(tested: Lanes, steps: int = 10_000) -> list[list[tuple[int, int]]]:
    """Step by step, what each lane computes: (lane, tokens) of those that have any. Every token is a 7."""
    done = []
    for _ in range(steps):
        if not tested.busy:
            break
        works = tested.schedule()
        done.append(
            [(lane, len(work.rows) + sum(count for _, count in work.pieces)) for lane, work in enumerate(works)]
        )
        for work in works:
            fed = [sequence for sequence, _ in work.pieces]
            for sequence, count in work.pieces:
                sequence.cached += count
            ended = [*work.rows, *(each for each in fed if not each.pending)]
            for sequence in ended:
                sequence.launched += 1
        tested.launched(works)
        for work in works:
            for sequence in [*work.rows, *(each for each, _ in work.pieces if not each.pending)]:
                if reason := tested.append(sequence, 7, None, 0.0):
                    tested.finish(sequence, reason, 0.0)
    return done


def lane_of(tested: Lanes, id: int) -> int:
    found = tested.find(id)
    assert found is not None
    return found.lane


def before(tested: Lanes) -> int | None:
    return tested.before


def placed(tested: Lanes, requests: Sequence[Request]) -> list[int]:
    return [lane_of(tested, tested.add(each, 0.0)) for each in requests]


def test_the_lane_with_the_least_to_do_is_next() -> None:
    """By tokens of prompts and answers, not by requests; the first of those that have as much."""
    tested = lanes(3)
    assert placed(tested, [asked(range(100)), asked(range(200, 210)), asked(range(300, 305))]) == [0, 1, 2]
    assert placed(tested, [asked(range(400, 420)), asked(range(500, 503)), asked([9])]) == [2, 1, 1]
    assert tested.promised == [110, 20 + 13 + 11, 15 + 30]
    run(tested)
    assert tested.promised == [0, 0, 0] and not tested.busy
    assert [tested.add(asked([1]), 0.0), tested.added] == [6, 7]  # ids count over all lanes


def test_a_conversation_goes_on_where_it_was() -> None:
    """Also where others have a little less to do; a lane that has much more does not get it."""
    tested = lanes(3)
    ids = list(range(60))
    assert placed(tested, [asked(range(500, 520)), asked(ids)]) == [0, 1]
    run(tested)
    turn = asked([*ids, *[7] * 10, 1, 2, 3])
    assert tested.found(turn) == 68
    assert placed(tested, [asked(range(600, 605)), turn]) == [0, 1]
    run(tested)
    other = asked(range(700, 830))
    assert placed(tested, [asked(range(900, 940)), other, turn]) == [0, 1, 2]  # more than it would save


def test_what_all_begin_with_does_not_bring_them_to_one_lane() -> None:
    tested, system = lanes(4), list(range(200))
    assert placed(tested, [asked(system)]) == [0]
    run(tested)
    assert tested.found(asked([*system, 1])) == 200
    found = placed(tested, [asked([*system, 1000 + each], ANSWER) for each in range(24)])
    # Each takes a lane 457 tokens, and the first one 257.
    assert Counter(found) == {0: 9, 1: 5, 2: 5, 3: 5} and found[0] == 0
    assert tested.lanes[0].found(asked([*system, 1])) == 200 and not tested.lanes[1].found(asked([*system, 1]))


def test_a_lane_that_is_full_is_the_last_choice() -> None:
    """Of sequences or of pages: even where it has what a request begins with."""
    tested = lanes(2, tokens=400, max_batch=2)
    ids = list(range(100))
    assert placed(tested, [asked(ids, 1)]) == [0]
    run(tested)
    assert placed(tested, [asked([*ids, 1], 50)]) == [0]
    run(tested, 2)
    assert placed(tested, [asked([*ids, 2], 50)]) == [0]
    run(tested, 2)
    assert len(tested.lanes[0].running) == 2 and before(tested) is None
    assert placed(tested, [asked([*ids, 3], 50)]) == [1]
    assert placed(tested, [asked([*ids, 4], 50, priority=3)]) == [0]  # both have somebody who waits: by what is to do
    assert before(tested) == 3
    run(tested)
    tested = lanes(2, tokens=400)
    placed(tested, [asked(ids, 200), asked([5], 9)])
    run(tested, 150)
    assert [len(lane.running) for lane in tested.lanes] == [1, 0] and tested.lanes[0].pages.left < 50
    assert placed(tested, [asked([*ids, *range(300, 500)], 9)]) == [1]


def test_every_host_makes_the_same_choices() -> None:
    """Requests that come, are put back and end at random: the same lanes, work and order, whichever is one's own."""
    rng = random.Random(4)
    begins = [[rng.randrange(90) for _ in range(length)] for length in (0, 9, 30)]
    requests = [
        asked([*rng.choice(begins), *(rng.randrange(90) for _ in range(rng.randint(1, 40)))], rng.randint(1, 60))
        for _ in range(80)
    ]
    every = []
    for own in range(3):
        dice, tested, found = random.Random(1), lanes(3, own, tokens=160, max_batch=5), []
        waiting = list(requests)
        while waiting or tested.busy:
            for request in [waiting.pop() for _ in range(min(len(waiting), dice.randint(0, 4)))]:
                tested.add(request, 0.0)
            found.append(run(tested, 1))
            if dice.random() < 0.1 and (one := tested.find(dice.randrange(80))):
                tested.finish(one, "abort", 0.0)
            found.append([[(each.id, each.lane) for each in (*tested.running, *tested.waiting)]])
        assert tested.put_back > 3 and all(lane.pages.unused for lane in tested.lanes)
        assert all(not lane.pages.changed for lane in tested.lanes if lane is not tested.lanes[own])
        every.append(found)
    assert every[0] == every[1] == every[2]


# The engine on ranks

Outcome = list[tuple[tuple[int, ...], str, str]]
Outcomes = tuple[Outcome, Outcome, Outcome, int, int]


def told(results: Sequence[Result]) -> Outcome:
    return [(each.ids, each.finish_reason, repr((each.logprobs, each.prompt_logprobs))) for each in results]


def engine(ranks: Ranks, cache: Any = None, memory: int | None = None, **limits: Any) -> Engine:
    model: Any = FakeModel(memory, meets=ranks if ranks.size > 1 else None)
    held: Any = cache or FakeCache()
    attention = "data" if ranks.size > 1 else "replicate"
    config = EngineConfig(eos_ids=[EOS], attention=attention, vocabulary=vocabulary, **limits)
    return Engine(model, held, ranks, config)


def many(kind: str) -> list[Request]:
    """Prompts of one token and of many; answers of one token and of many."""
    rng = random.Random(2)
    every: dict[str, list[dict[str, Any]]] = {
        "greedy": [{}],
        "mixed": [
            {"logprobs": 2},
            {"temperature": 1.0, "top_p": 0.9},
            {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "prompt_logprobs": 1},
            {"temperature": 1.0, "logit_bias": ((3, 5.0),), "logprobs": 1},
        ],
        "grammar": [{"grammar": "start: /[a-z]{4,30}/"}, {}, {"temperature": 1.0, "grammar": "start: /[A-Z]+[!?]/"}],
    }
    kinds = every[kind]
    return [
        Request(
            tuple(rng.randrange(VOCAB - 1) for _ in range(rng.choice([1, 2, 17, 50]))),
            SamplingParams(
                max_new_tokens=rng.choice([1, 9, 50]),
                ignore_eos=number % 3 > 0,
                seed=number,
                **kinds[number % len(kinds)],
            ),
        )
        for number in range(16)
    ]


LIMITS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # of requests, of the cache, of the engine
    "all at once": ("greedy", {}, {}),
    "one at a time": ("mixed", {}, {"max_batch": 1}),
    "prompts in pieces": ("mixed", {}, {"prefill_chunk": 7, "max_batch": 3}),
    "put back": ("mixed", {"tokens": 100}, {"prefill_chunk": 16}),
    "grammars": ("grammar", {}, {"max_batch": 4}),
    "grammars, put back": ("grammar", {"tokens": 100}, {"prefill_chunk": 16}),
}


def outcomes(ranks: Ranks, names: list[str], drafts: bool) -> list[Outcomes]:
    """Of each: all requests, the same again with what is found, one alone; put-backs, and steps of nobody's."""
    found: list[Outcomes] = []
    with pytest.MonkeyPatch.context() as patch:
        if drafts:
            dice = random.Random(3)
            try_some(patch, dice)
            draft_wrongly(patch, dice, VOCAB, 0.8)
        for name in names:
            kind, sizes, limits = LIMITS[name]
            cache, requests = FakeCache(**sizes), many(kind)
            tested = engine(ranks, cache, drafts=Costs.of(32, 4) if drafts else None, **limits)
            first, again = told(tested.generate(requests)), told(tested.generate(requests[::-1]))
            one = told(tested.generate(requests[4:5]))
            assert cache.empty() and all(lane.pages.unused for lane in tested.scheduler.lanes)
            model: Any = tested.model
            found.append((first, again, one, tested.scheduler.put_back, model.idle))
    return found


SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def alone() -> dict[str, Outcomes]:
    """What one rank says."""
    return dict(zip(LIMITS, outcomes(rank_of(0, 1), list(LIMITS), False), strict=True))


@pytest.mark.parametrize(
    ("size", "drafts", "names"),
    [
        (2, False, ["all at once", "grammars, put back"]),
        pytest.param(3, True, ["prompts in pieces", "put back"], marks=SLOW),  # tests/whole/test_data.py has drafts
        *(pytest.param(size, drafts, list(LIMITS), marks=SLOW) for size in (2, 3, 4) for drafts in (False, True)),
    ],
)
def test_answers_are_those_of_one_rank(size: int, drafts: bool, names: list[str], alone: dict[str, Outcomes]) -> None:
    """On every rank, of all requests; in every step all ranks were told of the sizes of all."""
    results = run_ranks(outcomes, size, names, drafts, timeout=200)
    for number, name in enumerate(names):
        for result in results:
            *answers, put_back, _ = result[number]
            assert answers == list(alone[name][:3]), name
            assert put_back == results[0][number][3] and (put_back > 0 or size > 3) == (
                "put back" in name or size > 3
            ), name
    # Of one request alone all ranks but one have nothing.
    assert sorted(result[0][4] > 0 for result in results)[1:] == [True] * (size - 1)


def short(count: int, seed: int) -> list[Request]:
    """Whose answers become longer than their prompts; none needs more than 60 positions."""
    rng = random.Random(seed)
    return [
        Request(
            tuple(rng.randrange(VOCAB - 1) for _ in range(rng.randint(1, 20))),
            SamplingParams(max_new_tokens=rng.choice((1, 7, 40)), ignore_eos=rng.random() < 0.7),
            priority=rng.choice((0, 0, 1)),
        )
        for _ in range(count)
    ]


def come_and_go(ranks: Ranks, seed: int) -> tuple[dict[int, tuple[tuple[int, ...], str]], int, list[int]]:
    """Added and ended at random, in whatever state they are."""
    rng, requests, cache = random.Random(seed), short(60, seed), FakeCache(tokens=64)
    tested, found, added = engine(ranks, cache, prefill_chunk=12, max_batch=5), dict[int, Any](), 0
    lane_s: list[Running] = []
    while added < len(requests) or tested.busy:
        if added < len(requests) and rng.random() < 0.8:
            assert tested.add(requests[added]) == added
            if one := tested.scheduler.find(added):
                lane_s.append(one)
            added += 1
        if rng.random() < 0.05 and (id := rng.randrange(added + 1)) < added and (ended := tested.abort(id)):
            found[id] = (ended.ids, ended.finish_reason)
        for event in tested.step():
            if isinstance(event, Finished):
                assert event.id not in found
                found[event.id] = (event.result.ids, event.result.finish_reason)
    assert tested.step() == [] and cache.empty()
    return found, tested.scheduler.put_back, [each.lane for each in lane_s]


@pytest.mark.parametrize("size", [pytest.param(2, marks=SLOW), 3])
def test_requests_come_and_go(size: int) -> None:
    requests = short(60, size)
    results = run_ranks(come_and_go, size, size)
    assert all(each == results[0] for each in results)
    found, put_back, where = results[0]
    assert put_back > 3 and set(where) == set(range(size)) and len(found) == 60
    for number, request in enumerate(requests):
        ids, reason = found[number]
        wanted = expected(request)
        assert ids == wanted[0][: len(ids)] and (reason == "abort" or (ids, reason) == wanted)
    assert sum(reason == "abort" for _, reason in found.values()) > 3


class Broken(FakeModel):
    """Logits are no numbers behind a 77."""

    def logits(self, norm_O1: torch.Tensor, part: tuple[int, int] | None) -> torch.Tensor:
        odd_O1 = torch.tensor([77 in self.outputs[int(each)] for each in norm_O1[:, 0]])[:, None]
        return super().logits(norm_O1, part).masked_fill(odd_O1, torch.nan)


def without_77() -> list[Request]:
    return [each for each in short(14, 1) if 77 not in (*each.ids, *expected(each)[0])]


def fails(ranks: Ranks) -> tuple[list[int], list[tuple[tuple[int, ...], str]], list[tuple[tuple[int, ...], str]]]:
    """Of which prompts it is told, how each ends, and what comes of the next call."""
    model: Any = Broken(meets=ranks)
    cache: Any = FakeCache(tokens=200)
    tested = Engine(model, cache, ranks, EngineConfig(eos_ids=[EOS], attention="data", max_batch=2))
    good = without_77()
    ends: dict[int, tuple[tuple[int, ...], str]] = {}
    with pytest.raises(NotFinite) as error:
        bad = Request((1, 2, 77, 3), good[0].params)
        tested.generate([*good[:3], bad, *good[3:]], on_finish=lambda n, each: ends.update({n: outputs([each])[0]}))
    return list(error.value.prompts), [ends[each] for each in sorted(ends)], outputs(tested.generate(good))


def test_logits_that_are_not_finite_are_one_requests_own() -> None:
    """All ranks look for where it began, and can go on."""
    wanted = [expected(each) for each in without_77()]
    assert len(wanted) > 5
    for prompts, ends, after in run_ranks(fails, 2):
        assert prompts == [4] and ends == [*wanted[:3], ((), "error"), *wanted[3:]] and after == wanted


def beforehand(ranks: Ranks) -> int:
    """Prefills of every kind, which all ranks make alike, of made-up prompts in each one's cache; then requests."""
    tested = engine(ranks, FakeCache(tokens=400), max_batch=6, prefill_chunk=40)
    load = Workload.of(short(20, 2), 6)
    with torch.inference_mode():
        tested.warm.run(load, tested.warm.missing(load, 6, 0), 20)
    tested.forget()
    assert [(each.ids, each.finish_reason) for each in tested.generate(short(20, 2))] == [
        expected(each) for each in short(20, 2)
    ]
    model: Any = tested.model
    return len(model.prefills())


def test_prefills_run_beforehand() -> None:
    counts = run_ranks(beforehand, 3)
    assert min(counts) > 10


def replayed(ranks: Ranks) -> list[Kind]:
    """Which parts with collectives the steps of many kinds of requests ran; each was prepared.

    Some ranks choose greedily, some sample or adjust logits, and some have nothing to do.
    """
    dice, requests, found = random.Random(3), many("mixed")[:9] + many("greedy")[9:], list[Kind]()
    with pytest.MonkeyPatch.context() as patch:
        try_some(patch, dice)
        draft_wrongly(patch, dice, VOCAB, 0.8)
        tested = engine(ranks, drafts=Costs.of(32, 4), prefill_chunk=40, max_batch=4)
        run, variants = tested.graphs._run, Workload.of(requests, 4).variants()

        def recorded(kind: Kind) -> None:
            found.append(kind)
            run(kind)

        patch.setattr(tested.graphs, "_run", recorded)
        tested.generate(requests)
    found = [each for each in found if each.part != "head"]
    assert {*found} <= {*tested.graphs.missing(variants, (4, tested.most_rows), [])}
    return found


def test_all_ranks_replay_what_was_captured_together() -> None:
    """NCCL may keep in a captured collective where the other ranks' memory is: all must replay that of one capture."""
    first, *others = run_ranks(replayed, 3)
    assert {each.part for each in first} == {"rows", "drafts"}
    assert all(each == first for each in others)
