"""The kernels of the choice against torch: every kind of logits, every way, adjusted or not; and what they compile to.

In the interpreter with small runs and little room for candidates, so that a small vocabulary has several runs, and
brackets that do not fit.

Letters: B rows · V vocabulary.
"""

import math
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from choosing import ADJUSTED, WAYS, Rows, Values, adjusted_rows, kinds_of_logits, rows_of, values_of
from compile_sm90 import compile_kernel
from interpret import interpreted

from epmoe.batch import Adjustments
from epmoe.kernels.sampling import choose, launch, top_logprobs
from epmoe.kernels.sampling.narrow import guessed
from epmoe.layers import sampling

VOCAB = 700  # three runs, the last one short
SIZES = {"RUN": 256, "PART": 128, "ROUND_PART": 128, "SUM_PART": 128}
SOME = [WAYS[way] for way in (0, 1, 3, 4, 7, 9, 12, 13, 15, 16, 19)]
KINDS = list(kinds_of_logits(64))


def small(function: Any, room: int, *args: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        programs = launch.PROGRAMS if room > 64 else 2  # or each program has several runs of a row
        for name, size in {**SIZES, "ROOM": room, "PROGRAMS": programs}.items():
            patch.setattr(launch, name, size)
        function(*args)


def same_ids(rows: Rows, device: str) -> launch.Record:
    """What the launches have left for each other on the way to the ids."""
    scan, records = launch._scan, []

    def kept(*args: Any) -> launch.Record:
        records.append(scan(*args))
        return records[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_scan", kept)
        assert choose(*rows.to(device)).tolist() == sampling.choose(*rows).tolist()
    return records[0]


def each_way(ways: list[Values], kind: str, vocab: int, device: str) -> None:
    same_ids(rows_of(kinds_of_logits(vocab)[kind].repeat(len(ways), 1), ways), device)


ROOMS = [*((kind, 64) for kind in KINDS), ("ordinary", 8), ("few values", 8), ("ordinary", 1024)]


@pytest.mark.parametrize(("kind", "room"), ROOMS)
def test_ways_in_the_interpreter(kind: str, room: int) -> None:
    interpreted(small, each_way, room, SOME, kind, VOCAB, "cpu")


def few_ways(vocab: int, device: str) -> None:
    """Logits apart from each other, in a wider memory whose rest must not be read."""
    wide_BV = torch.full((3, vocab + 64), torch.nan, device=device)
    wide_BV[:, :vocab] = kinds_of_logits(vocab)["ordinary"].expand(3, -1)
    rows = rows_of(wide_BV[:, :vocab].cpu(), [(0.0, 0, 1.0, 0.0), (1.0, 0, 0.9, 0.0), (1.0, 50, 0.9, 0.01)])
    moved = rows.to(device)._replace(logits_BV=wide_BV[:, :vocab])
    assert choose(*moved).tolist() == sampling.choose(*rows).tolist()


def test_the_sizes_that_ship_in_the_interpreter() -> None:
    interpreted(few_ways, 20_000, "cpu")


def tiny(device: str) -> None:
    for vocab in (1, 2, 33):
        logits_BV = torch.stack([each for each in kinds_of_logits(vocab).values() for _ in range(2)])
        same_ids(rows_of(logits_BV, [WAYS[1], WAYS[19]] * len(KINDS)), device)
    nothing = rows_of(torch.zeros(0, 50), [])
    assert choose(*nothing.to(device)).tolist() == []


def test_tiny_vocabularies_in_the_interpreter() -> None:
    interpreted(small, tiny, 16, "cpu")


def not_finite(device: str) -> None:
    """Wherever it stands, in whatever row, raw: an allowed mask hides none of it."""
    rows = adjusted_rows(VOCAB)
    for row, bad in enumerate([torch.nan, torch.inf, -torch.inf] * 3):
        rows.logits_BV[3 * row, 150 * row % VOCAB] = bad
    found = choose(*rows.to(device)).tolist()
    assert found == sampling.choose(*rows).tolist() and found[0:27:3] == [VOCAB] * 9


def test_what_is_not_finite_in_the_interpreter() -> None:
    interpreted(small, not_finite, 64, "cpu")


def adjusted(vocab: int, device: str) -> None:
    """The scores' bits, and the ids; what is None adjusts nothing."""
    rows = adjusted_rows(vocab)
    record = same_ids(rows, device)
    kind_B = rows.params.kind_S[rows.sequence_B]
    assert torch.equal(record.adjusted[:, :vocab].cpu()[kind_B > 0], rows.scores()[kind_B > 0])


def test_adjustments_in_the_interpreter() -> None:
    interpreted(small, adjusted, 64, VOCAB, "cpu")


def few_allowed(device: str) -> None:
    """Where a mask leaves fewer than top-k asks for, what is masked is no candidate: these have room."""
    ways: list[Values] = [(1.0, 50, 0.9, 0.0), (1.0, 50, 1.0, 0.0), (1.0, 0, 0.9, 0.0), (100.0, 50, 0.9, 0.0)]
    rows = rows_of(kinds_of_logits(VOCAB)["ordinary"].repeat(len(ways), 1), ways)
    handles = len(rows.params.kind_S)
    allowed_SW = torch.zeros(handles, -(-VOCAB // 32), dtype=torch.int32)
    allowed_SW[:, 3], allowed_SW[:, 20] = 0b1011, -1
    rows.params.kind_S.fill_(0b1000)
    rows = rows._replace(adjustments=Adjustments(torch.ones(handles, 3), allowed_SW=allowed_SW))
    assert max(same_ids(rows, device).candidates.tolist()) == 35


def far_below(device: str, belows: tuple[int, ...] = (3, 8, 70, 100, 300)) -> None:
    """Scores so far below 0 that a candidate of no token, were it 0, would weigh more than all; and a top-p that is 0
    in float32."""
    ways: list[Values] = [
        (1.0, 0, 1e-46, 0.0), (1.0, 0, 1e-300, 0.0), (1.0, 0, 0.9, 0.0), (0.01, 0, 0.9, 0.0), (1.0, 50, 0.9, 0.0),
        (0.1, 50, 0.9, 0.0), (1.0, 0, 0.9, 0.1),
    ]  # fmt: skip
    for below in belows:
        logits_BV = kinds_of_logits(VOCAB)["ordinary"].repeat(len(ways), 1) - below
        record = same_ids(rows_of(logits_BV, ways), device)
        assert int(record.kept.min()) >= 0 and int(record.kept.sum(1).max()) < VOCAB << 40


def test_scores_far_below_nothing_in_the_interpreter() -> None:
    """With room for some of them, and for all."""
    interpreted(small, far_below, 64, "cpu", (3, 70, 300))
    interpreted(small, far_below, 1024, "cpu", (8, 100))


def as_many(few: int, room: int) -> None:
    """As many candidates as there are places for, of either size, and one more: others weigh nothing."""
    generator, seen = torch.Generator().manual_seed(0), set()
    counts = (1, few, few + 1, room, room + 1)
    for count in counts:
        ways: list[Values] = [
            *((1.0, 0, top_p, 0.0) for top_p in (0.5, 1 - 2**-53)),
            *((1.0, top_k, 0.9, 0.0) for top_k in (max(1, count - 1), count, count + 1)),
            (1.0, 0, 0.9, 0.3),
        ]
        for spread in (0.0,) if count == 1 else (1e-3,) if count > room else (0.0, 1e-3):
            logits_V = torch.full((300,), -1e4)
            some = torch.randperm(300, generator=generator)[:count]
            logits_V[some] = torch.randn(count, generator=generator) * spread
            rows = rows_of(logits_V.repeat(len(ways), 1), ways)
            seen |= set(same_ids(rows, "cpu").candidates.tolist())
    assert seen >= set(counts)


def test_as_many_candidates_as_there_is_room_for_in_the_interpreter() -> None:
    interpreted(small, as_many, 64, 32, 64)


def rounds(vocab: int, device: str) -> None:
    """Few of these rows have no room for what two rounds leave."""
    ways: list[Values] = [(1.0, 0, top_p, 0.0) for top_p in (0.5, 0.8, 0.9, 0.95, 0.99)]
    generator = torch.Generator().manual_seed(3)
    logits_BV = torch.cat([torch.randn(len(ways), vocab, generator=generator) * each for each in (0.5, 1.0, 2.0, 3.0)])
    moved = rows_of(logits_BV, ways * 4).to(device)
    record = launch._scan(moved.logits_BV, moved.sequence_B, moved.position_B, moved.params, moved.adjustments)
    launch._narrow(moved.logits_BV, moved.sequence_B, moved.params, record, every=False)
    third_B = record.pivot[2, :, : launch.PIVOTS].isfinite().any(1)
    assert int(third_B.sum()) <= 3, third_B.tolist()


def test_two_rounds_are_mostly_enough_in_the_interpreter() -> None:
    """Of these 20 rows 10 need a third one where the second's pivots are spread wide."""
    interpreted(small, rounds, 64, 3142, "cpu")


@triton.jit
def guess_kernel(number_ptr, share_ptr):
    """Of four measures, what is needed and all there is."""
    first, second = tl.load(number_ptr), tl.load(number_ptr + 1)
    third, fourth = tl.load(number_ptr + 2), tl.load(number_ptr + 3)
    tl.store(share_ptr, guessed(first, second, third, fourth, tl.load(number_ptr + 4), tl.load(number_ptr + 5)))


def guesses() -> None:
    """As the first round leaves a row of a vocabulary's size: eight pivots, the border between two of them."""
    for spread in (0.3, 0.5, 1.0, 2.0):
        score_V = torch.randn(201_088, generator=torch.Generator().manual_seed(5)).double() * spread
        score_V = score_V.sort(descending=True).values
        weight_V = (score_V - score_V[0]).exp()
        below_V, (top, low) = weight_V.cumsum(0), (float(score_V[0]), float(score_V[-1]))
        for top_p in (0.5, 0.8, 0.9, 0.95):
            need, base = top_p * float(below_V[-1]), max(low, top - math.log(201_088 / (1 - top_p)))
            pivots = [base + (top - base) * j / 8 for j in range(9)]
            measures = [float(weight_V[score_V >= pivot].sum()) for pivot in pivots]
            at = sum(measure >= need for measure in measures) - 1
            four = [float(below_V[-1]) if j < 0 else measures[min(j, 8)] for j in range(at - 1, at + 3)]
            share = torch.zeros(1)
            guess_kernel[(1,)](torch.tensor([*four, need, float(below_V[-1])]), share)
            border = float(score_V[int((below_V < need).sum())])
            exact = (border - pivots[at]) / (pivots[at + 1] - pivots[at])
            assert abs(float(share) - exact) < 0.012, (spread, top_p, float(share), exact)


def test_where_the_border_of_normal_logits_is_guessed_in_the_interpreter() -> None:
    """To a hundredth of the first round's step; a curve through the measures themselves is off by more."""
    interpreted(guesses)


def test_few_allowed_in_the_interpreter() -> None:
    interpreted(small, few_allowed, 64, "cpu")


def alone(device: str) -> None:
    """A row chooses the same among others, whatever these ask for."""
    rows = adjusted_rows(VOCAB).to(device)
    together = choose(*rows).tolist()
    for row in range(0, len(together), 5):
        one = slice(row, row + 1)
        assert choose(rows.logits_BV[one], rows.sequence_B[one], rows.position_B[one], *rows[3:]).tolist() == [
            together[row]
        ]


def test_a_row_alone_in_the_interpreter() -> None:
    interpreted(small, alone, 64, "cpu")


def logprobs(kind: str, vocab: int, device: str) -> None:
    logits_BV = kinds_of_logits(vocab)[kind].repeat(3, 1)
    logits_BV[2, vocab // 2] = torch.nan
    id_B = torch.tensor([0, vocab - 1, 5])
    for top in (0 if kind == "ordinary" else 1, 100) if vocab == VOCAB else (0, 1, 5, 20, 100):
        found = top_logprobs(logits_BV.to(device), id_B.to(device), top)
        chosen_B, id_BQ, logprob_BQ = sampling.top_logprobs(logits_BV, id_B, top)
        assert torch.equal(found[1].cpu()[:2], id_BQ[:2])
        torch.testing.assert_close(found[0].cpu(), chosen_B, rtol=1e-14, atol=1e-12, equal_nan=True)
        torch.testing.assert_close(found[2].cpu(), logprob_BQ, rtol=1e-14, atol=1e-12, equal_nan=True)


def every_id(device: str) -> None:
    """As many log-probabilities as there are ids, or more."""
    logits_BV = kinds_of_logits(33)["few values"].repeat(2, 1)
    for top in (32, 33, 100):
        found = top_logprobs(logits_BV.to(device), torch.tensor([0, 32], device=device), top)
        assert found[1].tolist() == sampling.top_logprobs(logits_BV, torch.tensor([0, 32]), top)[1].tolist()


def test_log_probabilities_of_every_id_in_the_interpreter() -> None:
    interpreted(small, every_id, 256, "cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities_in_the_interpreter(kind: str) -> None:
    interpreted(small, logprobs, 256, kind, VOCAB, "cpu")


TYPES = {
    "float32": "logits adjusted penalty listed_value low pivot measure bracket",
    "float64": "value chosen_out logprob_out",
    "int32": "kind number allowed candidates candidate",
    "uint8": "seen",
}
POINTERS = {"float32": "*fp32", "float64": "*fp64", "int32": "*i32", "uint8": "*u8"}
OPTIONAL = [
    "penalty_ptr",
    "seen_ptr",
    "number_ptr",
    "listed_id_ptr",
    "listed_value_ptr",
    "listed_until_ptr",
    "allowed_ptr",
]
KERNELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "scan": (launch.scan_kernel, dict.fromkeys(OPTIONAL)),
    "adjust": (launch.scan_kernel, {}),
    "round": (launch.round_kernel, {"M": launch.ROUND_PART}),
    "sum": (launch.sum_kernel, {"M": launch.SUM_PART}),
    "border": (launch.border_kernel, {}),
    "draw": (launch.draw_kernel, {}),
    "top": (launch.top_kernel, {}),
}


def compiled(name: str, arch: int, **known: int) -> dict[str, int]:
    """As for 201,088 ids, with `ids` and strides that 16 divides; of `known` arguments the compiler has the value."""
    kernel, constants = KERNELS[name]
    kinds = {f"{each}_ptr": POINTERS[kind] for kind, names in TYPES.items() for each in names.split()}
    sizes = {"N": launch.RUN, "M": launch.PART, "SP": 32, "P": launch.PIVOTS, "ROOM": launch.ROOM, "K": 1024}
    sizes |= {"FEW": launch.FEW, "QP": launch.MOST_TOP, **constants, **known}
    constants = {each: size for each, size in sizes.items() if each in kernel.arg_names}
    signature = {
        each: kinds.get(each, "*i64" if each.endswith("_ptr") else "i32")
        for each in kernel.arg_names
        if each not in constants
    }
    wide = [each for each in ("stride", "ids", "adjusted_stride") if each not in known]
    return compile_kernel(
        kernel,
        signature,
        constants,
        launch.WARPS[name],
        arch=arch,
        divisible=wide,
        fusion=kernel is not launch.scan_kernel,
    )


@pytest.mark.parametrize("arch", [pytest.param(80, marks=pytest.mark.slow), 90, 100])
@pytest.mark.parametrize("name", KERNELS)
def test_compiles_without_spills(name: str, arch: int) -> None:
    assert compiled(name, arch)["spills"] == 0


@pytest.mark.parametrize("name", ["round", "sum"])
def test_what_is_loaded_ahead_comes_16_bytes_at_a_time(name: str) -> None:
    """As it does only where the compiler sees that a row's parts begin at multiples of 16 bytes. One is of pivots."""
    assert compiled(name, 90)["wide"] >= {"round": 1 + 2 * 2, "sum": 1 + 5}[name]


@pytest.mark.parametrize("name", KERNELS)
def test_compiles_for_a_vocabulary_of_one_id(name: str) -> None:
    """Which is no number of the launch any more then: Triton takes a 1 for a constant."""
    compiled(name, 90, ids=1, stride=1)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_on_a_gpu(kind: str) -> None:
    each_way(WAYS, kind, 201_088, "cuda")
    each_way(WAYS, kind, 8193, "cuda")


@pytest.mark.gpu
def test_adjustments_and_neighbours_on_a_gpu() -> None:
    few_ways(20_000, "cuda")
    tiny("cuda")
    few_allowed("cuda")
    far_below("cuda")
    not_finite("cuda")
    alone("cuda")
    for vocab in (VOCAB, 50_001, 201_088):
        adjusted(vocab, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities_on_a_gpu(kind: str) -> None:
    logprobs(kind, 201_088, "cuda")
    every_id("cuda")


@pytest.mark.gpu
def test_a_graph_on_a_gpu() -> None:
    """Nothing waits for the host: captured once, replayed with other logits, sequences and parameters."""
    from epmoe.kernels.capture import Capture

    rows = adjusted_rows(50_000).to("cuda")
    id_B = torch.empty_like(rows.sequence_B)

    def part() -> None:
        id_B.copy_(choose(*rows))

    graph = Capture(torch.device("cuda"))(part)
    for seed in range(3):
        generator = torch.Generator("cuda").manual_seed(seed)
        rows.logits_BV.normal_(0, 3, generator=generator)
        rows.params.value_SP[rows.sequence_B] = values_of(ADJUSTED * 8).to("cuda")
        rows.position_B.add_(7)
        graph.replay()
        assert torch.equal(id_B, choose(*rows))
        assert id_B.tolist() == sampling.choose(*rows.to("cpu")).tolist()
