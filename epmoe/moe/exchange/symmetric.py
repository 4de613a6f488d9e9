"""Slot rows in memory that the GPUs of one node map into each other: a rank writes its rows into its peers' memory.

    rank 0's place     [ 0 · own · 0 · own ]  ← down          [ 1 · own · own · 1 ]     rank 1's place
                         ▲            └──────── push ────────────►▲
                         └─────────────────── push ───────────────┘
                     the next norm waits for each row, adds them, and leaves POISON

A slot has one owner, so nothing is added on the way, and no rank waits for another before it writes: each has three
places, which layers take in turn (`Places.lend`), and by the time that one comes round again all ranks have read it
(epmoe/layers/push.py).

Letters: T tokens · K experts per token · H hidden · N ranks.
"""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from epmoe.kernels import symmetric
from epmoe.kernels.symmetric import ALIGNED, MARKS, Place
from epmoe.ranks.mesh import Ranks
from epmoe.streams import tell

# Bytes of a place: the rows of 1,456 tokens of gpt-oss in bf16 (4 rows of 2880 a token), of 728 in float32: more than a
# decode step is likely to have. A larger prefill goes by the process group. The memory is taken before weights and
# cache are, which see it as used.
ROOM = 32 << 20
PLACES = 3
MOST_RANKS = MARKS // 4
# Characters of a failure's reason that other ranks learn.
REASON = 200

Result = TypeVar("Result")


class Places:
    """The group's places, after all ranks have mapped each other's memory (see `connect`).

    Args:
        byte_N: uint8, PLACES places on each rank, POISON throughout.
        kept: what must live as long as these tensors are used.
    """

    def __init__(self, rank: int, byte_N: Sequence[torch.Tensor], kept: object = None) -> None:
        self.kept = kept
        room = len(byte_N[rank]) // PLACES
        parts = [[each[place * room : (place + 1) * room] for each in byte_N] for place in range(PLACES)]
        device = byte_N[rank].device
        self.places = [
            Place(rank, tuple(part), torch.tensor([each.data_ptr() for each in part], device=device)) for part in parts
        ]
        assert all(each.data_ptr() % ALIGNED == 0 for part in parts for each in part), "what kernels take for granted"
        self.room = room - MARKS
        self.layer, self.layers = 0, 0

    def begin(self, layers: int) -> None:
        """A pass through so many layers begins."""
        self.layer, self.layers = 0, layers

    def lend(self, x_TH: torch.Tensor, top_k: int) -> tuple[Place, torch.Tensor] | None:
        """The next layer's place, and its rows [T, K, H] in x's dtype, for this rank's slots alone; None when it is too
        small, or x of another dtype.

        The answer is the same on every rank. No two layers in a row have the same place, nor have the last of a pass
        and the first of the next: 0 1 2 1 2 … | 0 1 2 …, whichever graph is replayed after which. A layer without a
        place is a collective of the process group, behind which every rank has read the ones before; one without rows,
        too (the last of a pass of which no logits are wanted), else of two layers the first would follow itself. A
        model of one layer has no place.
        """
        turn, self.layer = self.layer, self.layer + 1
        if not self.places or self.layers < 2 or x_TH.dtype not in (torch.bfloat16, torch.float32):
            return None
        shape = (x_TH.shape[0], top_k, x_TH.shape[1])
        if not 0 < math.prod(shape) * x_TH.element_size() <= self.room:
            return None
        place = self.places[1 + (turn - 1) % 2 if turn else 0]
        return place, place.rows(shape, x_TH.dtype)

    def close(self) -> None:
        """Let go of the memory, after which all rows go by the process group. Waits for the device."""
        if self.places and self.places[0].address_N.device.type != "cpu":
            # Freeing waits too, but keeps Python's lock meanwhile, so that the watch could not end this rank if a peer
            # has been lost and a kernel waits for it.
            torch.accelerator.synchronize(self.places[0].address_N.device)
        self.places, self.kept = [], None


def connect(ranks: Ranks, room: int = ROOM) -> Places | None:
    """Map the ranks' memory into each other; None where that can't be, on all ranks alike.

    A collective of the expert group, whose waits the group's timeout or the watch bounds. A rank that fails by itself
    while the others are in torch's rendezvous ends the run, not just the attempt: they wait where the watch hears
    nothing of them. The memory lives until the group ends. Where CUDA devices do without it, rank 0 says why.
    """
    group = ranks.expert_group
    if group is None or not symmetric.possible(ranks.device):
        return None
    reason = unsuitable(ranks)
    if not reason:
        # Two meetings: a rank that waited in the second step for one that failed in the first would wait for long.
        buffer, reason = _agreed(ranks, lambda: symmetric.allocate(PLACES * (room + MARKS), ranks))
        if buffer is not None:
            mapped, reason = _agreed(ranks, lambda: symmetric.rendezvous(buffer, group))
            if mapped is not None:
                byte_N, handle = mapped
                places = Places(ranks.expert_rank, byte_N, (buffer, handle))
                ranks.until_end.append(places)
                return places
    if ranks.is_main:
        tell(f"epmoe: combine=slots goes by the process group, not by symmetric memory: {reason}")
    return None


def unsuitable(ranks: Ranks) -> str:
    """What speaks against symmetric memory that every rank knows by itself, or nothing."""
    if ranks.nodes > 1:
        return f"the ranks are on {ranks.nodes} nodes"
    if ranks.expert_size > MOST_RANKS:
        return f"{ranks.expert_size} ranks, and it serves {MOST_RANKS}"
    return ""


def _agreed(ranks: Ranks, attempt: Callable[[], Result]) -> tuple[Result | None, str]:
    """What `attempt` gives, if it succeeds on all ranks; else None and a failing rank's reason. A collective."""
    result, reason = None, ""
    try:
        result = attempt()
    except (RuntimeError, ImportError, AttributeError) as error:  # a torch without it, or with another one, included
        text = str(error).strip() or repr(error)
        reason = f"rank {ranks.expert_rank}: {text.splitlines()[0]}"
    everyone = ranks.gather(list(reason.encode()[:REASON].ljust(REASON)))
    reasons = [bytes(each).decode(errors="replace").strip() for each in everyone]
    found = next((each for each in reasons if each), "")
    return (None if found else result), found
