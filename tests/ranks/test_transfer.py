"""Results on their way to the host: a wait has a bound."""

import time
from typing import Any

import pytest
import torch

from epmoe.ranks.transfer import Arrival, NoArrival, Stage


def test_a_wait_has_a_bound() -> None:
    class Never:
        def query(self) -> bool:
            return False

    arrival = Arrival([torch.zeros(1)])
    never: Any = Never()
    arrival.event = never
    begin = time.monotonic()
    with pytest.raises(NoArrival, match=r"within 0\.2 s \(runtime\.timeout_s\)"):
        arrival.wait(0.2)
    assert 0.2 <= time.monotonic() - begin < 30


def fill(stage: Stage, number: int) -> int:
    """Where its memory on the host is."""
    first, rest = stage.begin()
    assert not first.any() and not rest.any() and (len(first), len(rest)) == (3, 2)
    first[:] = number
    stage.send()
    return int(first.ctypes.data)


def test_a_stage_uses_its_memory_again() -> None:
    stage = Stage(torch.full((5,), 9), [3, 2])
    places = {fill(stage, number) for number in range(1, 5)}
    assert stage.buffer.tolist() == [4, 4, 4, 0, 0] and len(places) == 1


@pytest.mark.gpu
def test_a_stage_waits_for_no_copy() -> None:
    """It takes other memory while one is still to come, and each is what it was when it was sent."""
    stage, found = Stage(torch.full((5,), 9, device="cuda"), [3, 2]), []
    torch.cuda.synchronize()
    begin = time.monotonic()
    torch.cuda._sleep(1_000_000_000)
    places = set()
    for number in range(1, 5):
        places.add(fill(stage, number))
        found.append(stage.buffer.clone())
    assert time.monotonic() - begin < 0.3 and len(places) == 4
    assert [each.tolist()[:4] for each in found] == [[number] * 3 + [0] for number in range(1, 5)]
    assert fill(stage, 5) in places


@pytest.mark.gpu
def test_a_step_that_does_not_end_is_given_up() -> None:
    arrival_of = torch.ones(1, device="cuda")
    torch.cuda.synchronize()
    torch.cuda._sleep(4_000_000_000)  # about two seconds
    arrival = Arrival([arrival_of])
    with pytest.raises(NoArrival):
        arrival.wait(0.3)
    assert arrival.wait(60)[0].tolist() == [1]
