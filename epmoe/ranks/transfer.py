"""Between the host and the device without waiting: small lists go there, results come back behind an event.

The host waits for an event by asking again and again, with a deadline: a collective inside a CUDA graph has no
watchdog, and a host that waited in the driver could not say what it waited for.
"""

import os
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

SPIN_S = 0.02  # longer waits than a decode step's are for a prefill, where half a millisecond does not count
NAP_S = 0.0005

# numpy takes a list in a quarter of torch's time, and a step waits for some.
_NUMPY = {torch.int32: np.int32, torch.int64: np.int64, torch.float64: np.float64}


class NoArrival(RuntimeError):
    """The device did not finish a step within the bound."""


def to_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of `values` (numbers, or rows of them) on the device; later work on the current stream sees it."""
    host = torch.from_numpy(np.asarray(values, dtype=_NUMPY[dtype]))
    if device.type in ("cpu", "meta") or not values:
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def overwrite(buffer: torch.Tensor, values: Sequence[int]) -> None:
    """Make these the first values of a buffer on the device, for all later work on the stream."""
    part = buffer[: len(values)]
    host = staging(part)
    host.numpy()[:] = values
    part.copy_(host, non_blocking=True)


def staging(buffer: torch.Tensor) -> torch.Tensor:
    """Zeros on the host, of a buffer's size and dtype, that can be copied there without a wait."""
    return torch.zeros(buffer.shape, dtype=buffer.dtype, pin_memory=buffer.device.type not in ("cpu", "meta"))


class Place(NamedTuple):
    """Memory on the host: the whole of it, its parts, and the end of the last copy out of it."""

    host: torch.Tensor
    parts: "list[np.ndarray[Any, Any]]"
    event: torch.Event | None  # None: a copy has ended when it has begun


class Stage:
    """A buffer on the device, and memory on the host from which it is filled, again and again, without a wait.

    Pinned memory that is taken for one copy and given back costs the host an event each time, and views of it some
    microseconds each, and a step waits for both.

    Args:
        buffer: one dimension.
        parts: sizes that it is made of, in its order.
    """

    def __init__(self, buffer: torch.Tensor, parts: Sequence[int]) -> None:
        self.buffer, self.sizes = buffer, list(parts)
        self.places: deque[Place] = deque()  # that which was copied last stands last

    def begin(self) -> "list[np.ndarray[Any, Any]]":
        """Zeros on the host, of the buffer's dtype, part by part."""
        if self.places and ((event := self.places[0].event) is None or event.query()):
            self.place = self.places.popleft()
            self.place.host.zero_()
        else:
            host = staging(self.buffer)
            accelerated = self.buffer.device.type not in ("cpu", "meta")
            event = torch.Event(self.buffer.device) if accelerated else None
            self.place = Place(host, [each.numpy() for each in host.split(self.sizes)], event)
        return self.place.parts

    def send(self) -> None:
        """What they hold now is in the buffer, for all later work on the stream."""
        self.buffer.copy_(self.place.host, non_blocking=True)
        if self.place.event is not None:
            self.place.event.record()
        self.places.append(self.place)


class Arrival:
    """Copies of some tensors on their way to the host, as they are at this point of the current stream."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self.event: torch.Event | None = None
        if tensors[0].device.type == "cpu":
            self.tensors = [tensor.clone() for tensor in tensors]
            return
        self.tensors = [torch.empty_like(tensor, device="cpu", pin_memory=True) for tensor in tensors]
        for here, there in zip(self.tensors, tensors, strict=True):
            here.copy_(there, non_blocking=True)
        self.event = torch.Event(tensors[0].device)
        self.event.record()

    def wait(self, timeout_s: float) -> list[torch.Tensor]:
        """The tensors on the host.

        Raises:
            NoArrival: not within `timeout_s`. The ranks' watch (epmoe/ranks/watch.py) usually ends the process before.
        """
        if self.event is not None:
            begin = time.monotonic()
            while not self.event.query():
                waited = time.monotonic() - begin
                if waited > timeout_s:
                    raise NoArrival(f"a step did not end within {timeout_s:g} s (runtime.timeout_s): does a rank hang?")
                if waited > SPIN_S:
                    time.sleep(NAP_S)
                else:  # also lets the watch's thread run; even a sleep of 0 takes 50 µs
                    os.sched_yield()
        return self.tensors
