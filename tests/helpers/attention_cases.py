"""Cases for attention over the paged cache, and the comparison of the fast implementation with the reference.

Letters: T tokens of a step · E query heads · J key/value heads · D head dimension · F = D/2.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from steps import make_step

from epmoe.batch import Step
from epmoe.cache.cache import Cache, CacheConfig
from epmoe.cache.plan import Plan
from epmoe.layers.attention import Heads, cached_attention
from epmoe.layers.heads import HeadPart


class Drafts(tuple[tuple[int, int], ...]):
    """A step of rows: (sequence, its tokens), of which the first counts, and half of the others."""


Inputs = tuple[Heads, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Case:
    """`steps` are steps of (sequence, new tokens) pairs; a number alone is a decode of the first so many sequences,
    filled up by 3 rows of the spare one, as are those with drafts. The first `filled` steps only fill the cache."""

    name: str
    window: int | None
    steps: tuple[tuple[tuple[int, int], ...] | Drafts | int, ...]
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    page: int = 4
    tokens: int = 1024
    sequences: int = 4
    filled: int = 0

    def __str__(self) -> str:
        return self.name


# Blocks have 32 positions in float32 and 64 in bfloat16, splits 256 (attention_triton.py).
CASES = [
    Case("one token", None, (((0, 1),), 1)),
    Case("one token, window", 7, (((0, 1),), 1)),
    Case("one token in the middle of spares", None, (((0, 3),), 1)),
    Case("page borders", None, (((0, 4), (1, 5)), 2, ((0, 3), (1, 2)), 2, 2)),
    Case("page of one", None, (((0, 40),), ((0, 3),), 1), page=1),
    Case("page of three", None, (((0, 40),), ((0, 3),), 1), page=3),
    Case("block borders", None, (((0, 31), (1, 32), (2, 33)), 3, 3, ((0, 31), (1, 33), (2, 64)), 3)),
    Case("split borders", None, (((0, 255), (1, 254), (2, 300)), 3, 3, 3), heads=2, kv_heads=1),
    Case("three splits beside one", None, (((0, 530), (1, 2)), 2, 2), heads=2, kv_heads=1),
    Case("splits of two groups of three", None, (((0, 240), (1, 480)), ((0, 20), (1, 40)), 2, 2), 6, 2, 24, filled=1),
    Case("window far into a sequence", 7, (((0, 300),), 1, 1), heads=2, kv_heads=1),
    Case("window slides", 7, (((0, 30), (1, 3)), 2, ((0, 2), (1, 9)), 2, ((0, 1), (1, 13)), 2)),
    Case("window of one", 1, (((0, 5),), 1, ((0, 40),), 1)),
    Case("window of whole blocks", 64, (((0, 70),), 1, ((0, 140),), 1)),
    Case("window longer than a split", 260, (((0, 250), (1, 400)), 2, ((0, 30), (1, 2)), 2), heads=2, kv_heads=1),
    Case("mixed", None, (((0, 5), (1, 40), (2, 1)), ((2, 1), (0, 9), (1, 1)), 3)),
    Case("mixed, window", 5, (((0, 5), (1, 40), (2, 1)), ((2, 1), (0, 9), (1, 1)), 3)),
    Case("forty spans", None, (tuple((s, 2 + s % 5) for s in range(40)), 40), heads=2, kv_heads=1, sequences=40),
    Case("forty spans, window", 7, (tuple((s, 2 + s % 9) for s in range(40)),) * 2, heads=2, kv_heads=1, sequences=40),
    Case("eight heads a group, D=64", None, (((0, 37), (1, 2)), 2, ((1, 35),), 2), heads=16, head_dim=64),
    Case("eight heads a group, D=64, window", 20, (((0, 37), (1, 2)), 2, ((1, 35),), 2), heads=16, head_dim=64),
    Case("drafts", None, (((0, 5), (1, 40), (2, 1)), Drafts(((0, 4), (1, 1), (2, 9))), Drafts(((2, 3), (0, 16))), 3)),
    Case("drafts, window", 7, (((0, 5), (1, 40), (2, 1)), Drafts(((0, 4), (1, 9), (2, 1))), Drafts(((1, 16),)), 3)),
    Case("drafts over splits", None, (((0, 250), (1, 510)), Drafts(((0, 9), (1, 16))), 2), 2, 1, filled=1),
    Case("one head a group", None, (((0, 37),), 1), heads=3, kv_heads=3),
    Case("five heads a group, D=8", 6, (((0, 37), (1, 3)), 2), heads=5, kv_heads=1, head_dim=8),
    Case("twenty heads a group, D=24", None, (((0, 37), (1, 3)), 2), heads=20, kv_heads=1, head_dim=24),
]


# Cases on so many ranks: whole groups each; a head's queries on several.
SHARED = {
    "one head a group": 3,
    "eight heads a group, D=64": 2,
    "mixed, window": 2,
    "splits of two groups of three": 6,
    "drafts over splits": 2,
}


def new_cache(case: Case, dtype: torch.dtype, device: str, sequences: int | None = None) -> Cache:
    """A cache whose memory holds NaN: what is read before it was written shows."""
    shape = (case.window,), case.kv_heads, case.head_dim
    count = case.sequences if sequences is None else sequences
    made = Cache(CacheConfig(*shape, tokens=case.tokens, sequences=count, page=case.page, dtype=dtype), device)
    for stored in made.layers:
        stored.fill_(torch.nan)
    return made


def random_inputs(case: Case, tokens: int, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """(q, k, v) and (cos, sin) of T tokens; k and v are columns of one tensor, as a fused projection leaves them."""
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(tokens, 2 * case.kv_heads, case.head_dim, generator=generator)
    q_TED = torch.randn(tokens, case.heads, case.head_dim, generator=generator) * 2
    angle_TF = torch.rand(tokens, case.head_dim // 2, generator=generator) * 6
    both, q_TED, angle_TF = both.to(device, dtype), q_TED.to(device, dtype), angle_TF.to(device)
    return (q_TED, both[:, : case.kv_heads], both[:, case.kv_heads :]), (angle_TF.cos() * 1.2, angle_TF.sin() * 1.2)


def random_sinks(case: Case, dtype: torch.dtype, device: str) -> torch.Tensor:
    return (torch.randn(case.heads, generator=torch.Generator().manual_seed(1)) * 2).to(device, dtype)


def plans(case: Case, store: Cache) -> Iterator[tuple[Plan, int, int]]:
    """(plan, its tokens, how many of them count) of each step."""
    steps = [tuple((s, 1) for s in range(step)) if isinstance(step, int) else step for step in case.steps]
    sequences = sorted({sequence for step in steps for sequence, _ in step})
    handles = {sequence: store.pages.admit()[0] for sequence in sequences}
    lengths = dict.fromkeys(sequences, 0)
    for given, step in zip(case.steps, steps, strict=True):
        for s, n in step:  # pages come as sequences grow, and those that a window leaves behind have other owners then
            assert store.grow(handles[s], lengths[s], lengths[s] + n) == n
        if isinstance(given, Drafts):
            rows = [(handles[s], lengths[s] + ahead) for s, n in step for ahead in range(n)]
            plan = store.plan(replace(decode_step(store, rows, spares=3), drafted=True))
            yield plan[case.window], len(rows) + 3, len(rows)
            step = tuple((s, 1 + (n - 1) // 2) for s, n in step)
        elif isinstance(given, int):
            plan = store.plan(decode_step(store, [(handles[s], lengths[s]) for s in range(given)], spares=3))
            yield plan[case.window], given + 3, given
        else:
            plan = store.plan(make_step([(handles[s], [0] * n, lengths[s]) for s, n in step], device=store.device))
            yield plan[case.window], sum(n for _, n in step), sum(n for _, n in step)
        for sequence, count in step:
            lengths[sequence] += count


def decode_step(store: Cache, rows: Sequence[tuple[int, int]], spares: int = 0) -> Step:
    """A token for each (handle, cached positions), and `spares` rows of the spare sequence."""
    rows = [*rows, *[(store.spare, 0)] * spares]
    sequence_B, position_B = torch.tensor(rows, dtype=torch.int64, device=store.device).T.contiguous()
    return Step(torch.zeros_like(position_B), position_B, sequence_B)


def compare(case: Case, device: str, dtype: torch.dtype, rtol: float, atol: float) -> None:
    """Every step by both implementations from the same cache: outputs and the caches afterwards agree."""
    from epmoe.kernels.attention import launch as attention_triton

    store = new_cache(case, dtype, device)
    sink_E = random_sinks(case, dtype, device)
    for number, (plan, tokens, counted) in enumerate(plans(case, store)):
        heads, cos_sin = random_inputs(case, tokens, dtype, device, number)
        if number < case.filled:
            cached_attention(heads, cos_sin, store.layer(0), plan, sink_E)
            continue
        key_JRD, value_JRD = store.layer(0)
        reference = key_JRD.clone(), value_JRD.clone()
        wanted_TED = cached_attention(heads, cos_sin, reference, plan, sink_E)
        got_TED = attention_triton.cached_attention(heads, cos_sin, store.layer(0), plan, sink_E)
        assert got_TED.dtype == dtype
        torch.testing.assert_close(got_TED[:counted], wanted_TED[:counted], rtol=rtol, atol=atol)
        rows = owned_rows(store)  # the spare rows hold whichever of their writers came last
        for got, wanted in zip(store.layer(0), reference, strict=True):
            # keys: a product of the rotation may be fused with its sum
            torch.testing.assert_close(got[:, :rows], wanted[:, :rows], rtol=rtol, atol=atol, equal_nan=True)


def compare_parts(case: Case, ranks: int, device: str, dtype: torch.dtype, fast: bool) -> None:
    """Every step with all heads, and with those of each of so many ranks alone: outputs and caches in the same bits."""
    from epmoe.kernels.attention import launch as attention_triton

    attention = attention_triton.cached_attention if fast else cached_attention
    parts = [HeadPart.of(case.heads, case.kv_heads, rank, ranks) for rank in range(ranks)]
    cases = [case, *(replace(case, heads=part.query.size, kv_heads=part.kv.size) for part in parts)]
    stores = [new_cache(each, dtype, device) for each in cases]
    query, kv = [[slice(*getattr(part, of)[:2]) for part in parts] for of in ("query", "kv")]
    sink_E = random_sinks(case, dtype, device)
    steps = zip(*(plans(each, store) for each, store in zip(cases, stores, strict=True)), strict=True)
    for number, ((plan, tokens, counted), *others) in enumerate(steps):
        (q_TED, k_TJD, v_TJD), cos_sin = random_inputs(case, tokens, dtype, device, number)
        whole_TED = attention((q_TED, k_TJD, v_TJD), cos_sin, stores[0].layer(0), plan, sink_E)
        assert whole_TED[:counted].isfinite().all()
        rows = owned_rows(stores[0])
        for (own, _, _), store, mine, its, part in zip(others, stores[1:], query, kv, parts, strict=True):
            heads = q_TED[:, mine], k_TJD[:, its], v_TJD[:, its]
            out_TED = attention(heads, cos_sin, store.layer(0), own, sink_E[mine], part.among)
            assert torch.equal(out_TED[:counted], whole_TED[:counted, mine])
            for part_JRD, whole_JRD in zip(store.layer(0), stores[0].layer(0), strict=True):
                pair = part_JRD[:, :rows], whole_JRD[its, :rows]
                assert torch.equal(*(each.nan_to_num(9e9) for each in pair))  # what nobody wrote is NaN in both


def owned_rows(store: Cache) -> int:
    """Rows from 0 on that belong to requests; the last page does not."""
    (pool,) = store.pools.values()
    return pool.rows - pool.page
