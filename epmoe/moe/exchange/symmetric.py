"""Slot rows in memory that the GPUs of one node map into each other: adding them up takes one kernel and no library.

torch's two-shot all-reduce works in place on such a buffer: a barrier, each rank adds its share of all ranks' rows and
writes the sums to every rank, a barrier. Measured on 2 H200 over NVLink, in a CUDA graph, against NCCL's all-reduce of
the same rows: 7.4 µs against 10.7 at one token of gpt-oss, 25.8 against 38.7 at 256, 78.8 against 100 at 1024.

One buffer serves all layers and steps. Nothing remote touches it between two calls: no peer reads or writes a rank's
rows before that rank's kernel has come to the first barrier, nor after its kernel has ended. And the rows are consumed
before the next layer's experts write theirs, all in one stream: by the next sublayer's norm (epmoe/layers/owed.py),
which leaves the zeros that other ranks' slots must hold then.

Letters: T tokens · K experts per token · H hidden.
"""

import math
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from epmoe.kernels import symmetric
from epmoe.ranks.mesh import Ranks
from epmoe.streams import tell

# Holds the rows of 1,456 tokens of gpt-oss in bf16 (4 rows of 2880 a token), of 728 in float32: more than a decode step
# is likely to have. A larger prefill goes by the process group, which takes a tenth longer there (8192 tokens: 642 µs
# against 577) but needs no memory of its own. The buffer is taken before weights and cache are, which see it as used.
ROOM = 32 << 20
# Numbers of ranks for which torch has compiled the kernel with its loop over the ranks unrolled.
SIZES = (2, 4, 8)
# The kernel moves so many bytes at a time, and its ranks share out whole ones.
VECTOR = 16
# Characters of a failure's reason that other ranks learn.
REASON = 200

Result = TypeVar("Result")


class SymmetricRows:
    """This rank's buffer, after all ranks have mapped each other's (see `connect`)."""

    def __init__(self, buffer: torch.Tensor, group: dist.ProcessGroup) -> None:
        self.buffer: torch.Tensor | None = buffer  # uint8
        self.group, self.size = group, group.size()
        # Whether the buffer may hold anything but zeros by the time that the next rows are asked for. A whole step of
        # the model leaves zeros, so a captured one may be replayed after any other; but not after one that raised
        # half-way, which ends the run (watch.py).
        self.dirty = True

    def lend(self, x_TH: torch.Tensor, top_k: int) -> torch.Tensor | None:
        """Zeros [T, K, H] in x's dtype at the buffer's beginning; None when it is too small or of another dtype.

        The answer is the same on every rank. The last call's rows are gone: set to zero here, or, where the memory was
        given back, by who read them.
        """
        if self.buffer is None or x_TH.dtype not in (torch.bfloat16, torch.float32):
            return None
        shape = (x_TH.shape[0], top_k, x_TH.shape[1])
        count = math.prod(shape)
        if self._padded(count, x_TH.dtype) * x_TH.element_size() > self.buffer.nbytes:
            return None
        if self.dirty:
            self.buffer.zero_()
        self.dirty = count > 0
        return self.buffer.view(x_TH.dtype)[:count].view(shape)

    def give_back(self) -> None:
        """What comes next on the stream reads the last rows and leaves zeros in their place."""
        self.dirty = False

    def add(self, y_TKH: torch.Tensor) -> None:
        """Sum over the ranks, in place, of rows that `lend` gave; a collective. Never waits; fits a CUDA graph."""
        assert self.buffer is not None and y_TKH.data_ptr() == self.buffer.data_ptr(), "these rows were not lent"
        # The padding's zeros are added up as well; a larger step's rows will lie there.
        flat = self.buffer.view(y_TKH.dtype)[: self._padded(y_TKH.numel(), y_TKH.dtype)]
        symmetric.two_shot(flat, self.group)

    def close(self) -> None:
        """Let go of the memory, after which all rows go by the process group. Waits for the device."""
        if self.buffer is not None and self.buffer.device.type != "cpu":
            # Freeing waits too, but keeps Python's lock meanwhile, so that the watch could not end this rank if a peer
            # has been lost and a kernel waits for it.
            torch.accelerator.synchronize(self.buffer.device)
        self.buffer = None

    def _padded(self, count: int, dtype: torch.dtype) -> int:
        """Values in whole vectors for each rank: at least `count`."""
        share = VECTOR * self.size // dtype.itemsize
        return -(-count // share) * share


def connect(ranks: Ranks, room: int = ROOM) -> SymmetricRows | None:
    """Map the ranks' buffers into each other; None where that can't be, on all ranks alike.

    A collective of the expert group, whose waits the group's timeout or the watch bounds. A rank that fails by itself
    while the others are in torch's rendezvous ends the run, not just the attempt: they wait where the watch hears
    nothing of them. The buffer lives until the group ends. Where CUDA devices do without it, rank 0 says why.
    """
    group = ranks.expert_group
    if group is None or not symmetric.possible(ranks.device):
        return None
    reason = unsuitable(ranks)
    if not reason:
        # Two meetings: a rank that waited in the second step for one that failed in the first would wait for long.
        buffer, reason = _agreed(ranks, lambda: symmetric.allocate(room, ranks))
        if buffer is not None:
            _, reason = _agreed(ranks, lambda: symmetric.rendezvous(buffer, group))
            if not reason:
                shared = SymmetricRows(buffer, group)
                ranks.until_end.append(shared)
                return shared
    if ranks.is_main:
        tell(f"epmoe: combine=slots goes by the process group, not by symmetric memory: {reason}")
    return None


def unsuitable(ranks: Ranks) -> str:
    """What speaks against symmetric memory that every rank knows by itself, or nothing."""
    if ranks.nodes > 1:
        return f"the ranks are on {ranks.nodes} nodes"
    if ranks.expert_size not in SIZES:
        return f"{ranks.expert_size} ranks, and it serves {', '.join(map(str, SIZES))}"
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
