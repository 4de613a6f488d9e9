"""Control: the orders of a replica's first rank to all of its ranks, a message a turn, which travels meanwhile.

    rank 0      order 3 ─▶ │ turn 2: a step │ order 4 ─▶ │ turn 3 … │
    rank 1                 │ turn 2: a step │  ▶ order 3 │ turn 3 … │      it has come long before, and nobody waits

A message has SIZE bytes, on the CPU, in a gloo group of its own: its length, then JSON. What is longer goes on in a
second one, which only those turns have that bring long prompts. Without orders it is empty, and a heartbeat: where
nothing runs the first rank sends one every `beat_s`, so that no wait for it comes near the group's timeout.

Letters: S bytes of a message · R bytes of what is longer.
"""

import json
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from epmoe.ranks.mesh import Ranks

SIZE = 4096
HEAD = 8  # of them for the length
BEAT_S = 1.0

Orders = Mapping[str, Any]  # what JSON can hold; nothing: a heartbeat


class Control:
    """Each rank makes one, at the same time, and takes the same turns; a rank alone needs no group.

    Args:
        timeout_s: how long the first rank may be silent between the first turn and `settle`. The watch notices a rank
            that dies or stops long before.
    """

    def __init__(self, ranks: Ranks, timeout_s: float) -> None:
        self.leads, self.first, self.beat_s = ranks.leads, ranks.first, min(BEAT_S, timeout_s / 4)
        self.watch = ranks.watch
        self.hear: Callable[..., object] = lambda *said: None
        self.group: dist.ProcessGroup | None = None
        limit = timedelta(seconds=timeout_s)
        for replica in range(ranks.replicas if ranks.expert_size > 1 else 0):  # each rank makes those of all
            begin = replica * ranks.expert_size
            members = list(range(begin, begin + ranks.expert_size))
            group = dist.new_group(members, backend="gloo", timeout=limit)
            self.group = group if replica == ranks.replica else self.group
        self.message = bytearray(SIZE)
        self.message_S = torch.frombuffer(self.message, dtype=torch.uint8)
        self.works: list[dist.Work] = []  # of the message that travels
        self.sent: Orders = {}  # rank 0's that travel
        self.rest_R: torch.Tensor | None = None  # lives until it is sent

    def turn(self, orders: Orders | None = None) -> Orders:
        """Send the first rank's orders (the others have None), and give those of this turn. A collective.

        They are those of the turn before it, which have travelled meanwhile: nothing in the first turn. In a rank alone
        they are the very ones that were given.

        Raises:
            RuntimeError: the first rank has said nothing for `timeout_s`, or is gone.
        """
        if self.group is None:
            return orders or {}
        due = self._arrive()
        self._send(orders or {})
        return due

    def listen(self, hear: Callable[..., object]) -> None:
        """Call `hear` with what each rank reports from now on, on threads of the first; on others it means nothing."""
        self.hear = hear
        if self.watch is not None and self.leads:
            self.watch.heard = hear

    def report(self, *said: Any) -> None:
        """Let the first rank hear that, what JSON can hold: at once, beside all turns. On any thread of any rank."""
        if self.leads or self.watch is None:
            self.hear(*said)
        else:
            self.watch.report(self.first, *said)

    @property
    def travelling(self) -> bool:
        """On the first rank, whether there are orders that the next turn will give."""
        return bool(self.sent)

    def settle(self) -> None:
        """Nothing travels until the next turn, however long that takes; what was sent last means nothing. A collective.

        The last orders given told all ranks that this comes.
        """
        self._arrive()

    def _send(self, orders: Orders) -> None:
        if not self.leads:
            self._begin(self.message_S)
            return
        self.sent = orders
        data = json.dumps(orders).encode() if orders else b""
        head = len(data).to_bytes(HEAD, "little") + data[: SIZE - HEAD]
        self.message[: len(head)] = head
        self._begin(self.message_S)
        if len(data) > SIZE - HEAD:
            self.rest_R = torch.frombuffer(bytearray(data[SIZE - HEAD :]), dtype=torch.uint8)
            self._begin(self.rest_R)

    def _begin(self, content: torch.Tensor) -> None:
        self.works.append(dist.broadcast(content, group=self.group, group_src=0, async_op=True))

    def _arrive(self) -> Orders:
        """The orders that travel, once they are here; on the first rank, once they may be overwritten."""
        if not self.works:
            return {}
        self._wait()
        if self.leads:
            due, self.sent, self.rest_R = self.sent, {}, None
            return due
        length = int.from_bytes(self.message[:HEAD], "little")
        data = self.message[HEAD : HEAD + length]
        if length > len(data):
            rest = bytearray(length - len(data))
            self._begin(torch.frombuffer(rest, dtype=torch.uint8))
            self._wait()
            data += rest
        found: Orders = json.loads(data) if length else {}
        return found

    def _wait(self) -> None:
        for work in self.works:
            work.wait()
        self.works.clear()
