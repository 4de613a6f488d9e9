"""Rows of logits of every kind, ways to choose from them, and the definition of the choice in Python's integers.

Letters: B rows · V vocabulary.
"""

import math
from typing import NamedTuple

import torch

from epmoe.batch import Adjustments, Listed, SamplingTensors
from epmoe.layers.adjust import adjust

MASK = 2**64 - 1
MOST = torch.finfo(torch.float32).max


def kinds_of_logits(vocab: int) -> dict[str, torch.Tensor]:
    """float32 [V] each."""
    random = torch.Generator().manual_seed(vocab)
    ordinary = torch.randn(vocab, generator=random) * 3
    peaked = ordinary.clone()
    peaked[vocab * 2 // 3] = 40.0
    spikes = torch.full((vocab,), -1e4)
    spikes[:: max(1, vocab // 7)] = torch.randn(len(spikes[:: max(1, vocab // 7)]), generator=random) * 0.5
    extreme = ordinary.clone()
    extreme[0], extreme[-1] = MOST, -MOST
    return {
        "ordinary": ordinary,
        "flat": ordinary * 1e-3 - 5,
        "all equal": torch.full((vocab,), -2.5),
        "zeros of both signs": torch.zeros(vocab) * torch.where(torch.arange(vocab) % 3 == 0, -1.0, 1.0),
        "peaked": peaked,
        "few values": (ordinary / 2).round(),
        "bf16": ordinary.bfloat16().float(),
        "spikes over a floor": spikes,
        "extreme": extreme,
        "rising": torch.arange(vocab, dtype=torch.float32) * 0.01,
        "falling": -torch.arange(vocab, dtype=torch.float32),
        "far away": ordinary + 1e6,
    }


Values = tuple[float, int, float, float]  # temperature, top-k, top-p, min-p

WAYS: list[Values] = [
    (0.0, 0, 1.0, 0.0),
    (1.0, 0, 1.0, 0.0),
    (1e-6, 0, 1.0, 0.0),
    (100.0, 0, 1.0, 0.0),
    (0.7, 5, 1.0, 0.0),
    (1.0, 50, 1.0, 0.0),
    (1.0, 1, 1.0, 0.0),
    (2.0, 6000, 1.0, 0.0),
    (1.0, 10**9, 1.0, 0.0),
    (1.0, 0, 0.9, 0.0),
    (1.0, 0, 0.3, 0.0),
    (2.0, 0, 1e-9, 0.0),
    (1.3, 0, 0.999999, 0.0),
    (1.0, 0, 1 - 2**-53, 0.0),
    (100.0, 0, 0.7, 0.0),
    (1.0, 40, 0.9, 0.0),
    (1.5, 6000, 0.95, 0.0),
    (1.0, 0, 1.0, 0.1),
    (1.0, 0, 1.0, 1.0),
    (0.6, 40, 0.9, 0.02),
    (1.0, 0, 0.9, 0.01),
]


class Reference(NamedTuple):
    """What the definition says of a row."""

    id: int
    kept: list[int]  # by order
    weight: dict[int, int]  # of each of them


def reference(score_V: torch.Tensor, values: Values, seed: int, position: int) -> Reference:
    """The definition on a finite row, step by step, in Python's numbers."""
    scores, vocab = score_V.tolist(), len(score_V)
    temperature, top_k, top_p, min_p = values
    order = sorted(range(vocab), key=lambda id: (-scores[id], id))
    if temperature == 0:
        return Reference(order[0], order[:1], {order[0]: 1})
    inverse, best = 1 / temperature, scores[order[0]]
    # torch's exp, whose last bit no other promises
    found = (torch.tensor([(scores[id] - best) * inverse for id in order], dtype=torch.float64)).exp() * 2.0**40
    weight = dict(zip(order, map(round, found.tolist()), strict=True))
    kept = order[:top_k] if top_k else order
    if top_p < 1:
        total = sum(weight[id] for id in kept)
        need, reached, count = min(total, math.ceil(top_p * float(total))), 0, 0
        while reached < need:
            reached += weight[kept[count]]
            count += 1
        kept = kept[:count]
    kept = [id for id in kept if weight[id] >= min_p * 2.0**40]
    total = sum(weight[id] for id in kept)
    target = hashed(seed, position) * total >> 64
    for id in sorted(kept):
        target -= weight[id]
        if target < 0:
            return Reference(id, kept, {each: weight[each] for each in kept})
    raise AssertionError("the running sum never passes the target")


def hashed(seed: int, position: int) -> int:
    """64 bits without a sign."""
    golden = 0x9E3779B97F4A7C15
    start = splitmix((splitmix((seed + golden) & MASK) + position * golden) & MASK)
    return splitmix((start + golden) & MASK)


def splitmix(z: int) -> int:
    """SplitMix64's finaliser in Python's integers."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


class Rows(NamedTuple):
    """What `choose` takes; handles are in no order, and some are nobody's."""

    logits_BV: torch.Tensor
    sequence_B: torch.Tensor
    position_B: torch.Tensor
    params: SamplingTensors
    adjustments: Adjustments | None

    def to(self, device: str) -> "Rows":
        found = self.adjustments

        def moved(each: torch.Tensor | None) -> torch.Tensor | None:
            return None if each is None else each.to(device)

        if found is not None:
            listed = found.listed and Listed(*(each.to(device) for each in found.listed))
            kept = (moved(found.seen_SV), moved(found.count_SV), listed, moved(found.allowed_SW))
            found = Adjustments(found.penalty_S3.to(device), *kept)
        logits_BV, sequence_B, position_B = (each.to(device) for each in self[:3])
        return Rows(
            logits_BV, sequence_B, position_B, SamplingTensors(*(each.to(device) for each in self.params)), found
        )

    def scores(self) -> torch.Tensor:
        """The adjusted logits of all rows, finite; on the CPU."""
        if self.adjustments is None:
            return self.logits_BV
        kind_B = self.params.kind_S[self.sequence_B]
        adjusted_BV = adjust(self.logits_BV, self.adjustments[self.sequence_B], kind_B, self.position_B)
        return adjusted_BV.clamp(-MOST, MOST)


ADJUSTED: list[Values] = [(0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (1.2, 20, 1.0, 0.0), (0.9, 0, 0.8, 0.05)]


def adjusted_rows(vocab: int) -> Rows:
    """Two rows for each of 16 sets of kinds, in two ways of ADJUSTED: penalties, lists with ids twice, masks."""
    random = torch.Generator().manual_seed(5)
    ways = [ADJUSTED[(kind + 2 * half) % 4] for half in range(2) for kind in range(16)]
    count, entries = len(ways), 24
    rows = rows_of(torch.randn(count, vocab, generator=random) * 3, ways)
    handles = len(rows.params.kind_S)
    rows.params.kind_S[rows.sequence_B] = torch.arange(16, dtype=torch.int32).repeat(2)
    id_SK = torch.randint(vocab, (handles, entries), generator=random)
    value_SK = torch.randn(handles, entries, generator=random) * 4
    value_SK[:, ::5] = -math.inf
    id_SK[:, 1] = id_SK[:, 0]  # a bias of what ends the answer
    until_SK = torch.where(torch.rand(handles, entries, generator=random) < 0.7, 2**62, 3)
    id_SK[:, 20:], value_SK[:, 20:], until_SK[:, 20:] = 0, 0, 0  # where a list is shorter
    adjustments = Adjustments(
        torch.rand(handles, 3, generator=random) * torch.tensor([1.5, 1.0, 1.0]) + torch.tensor([0.3, -0.5, -0.5]),
        torch.rand(handles, vocab, generator=random) < 0.3,
        torch.randint(-20, 5, (handles, vocab), dtype=torch.int32, generator=random).clamp(0),
        Listed(id_SK, value_SK, until_SK),
        torch.randint(-(2**31), 2**31, (handles, -(-vocab // 32)), generator=random).int(),
    )
    return rows._replace(adjustments=adjustments)


def values_of(ways: list[Values]) -> torch.Tensor:
    """A row of `SamplingTensors.value_SP` for each."""
    value_B4 = torch.tensor(ways, dtype=torch.float64).reshape(len(ways), 4)
    temperature_B1 = value_B4[:, :1]
    return torch.cat([value_B4, 1 / temperature_B1.where(temperature_B1 > 0, 1)], dim=1)


def rows_of(logits_BV: torch.Tensor, ways: list[Values]) -> Rows:
    """Rows without adjustments, a way each."""
    count = len(ways)
    handle_B = torch.randperm(count + 3, generator=torch.Generator().manual_seed(count))[:count]
    value_SP = torch.full((count + 3, 5), torch.nan, dtype=torch.float64)
    seed_S = torch.randint(2**62, (count + 3,), generator=torch.Generator().manual_seed(1))
    value_SP[handle_B] = values_of(ways)
    params = SamplingTensors(value_SP, seed_S, torch.zeros(count + 3, dtype=torch.int32))
    return Rows(logits_BV, handle_B, torch.arange(count) * 1001, params, None)


def chi_square(ids: torch.Tensor, probability_V: torch.Tensor) -> float:
    """(χ² − dof) / √(2·dof): about standard normal when the frequencies follow the probabilities."""
    expected = probability_V * len(ids)
    enough = expected > 5
    counts = torch.bincount(ids, minlength=len(probability_V)).double()
    statistic = ((counts - expected)[enough] ** 2 / expected[enough]).sum()
    dof = int(enough.sum())
    return float((statistic - dof) / (2 * dof) ** 0.5)
