"""Results on their way to the host: a wait has a bound."""

import time
from typing import Any

import pytest
import torch

from epmoe.ranks.transfer import Arrival, NoArrival


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
    assert 0.2 <= time.monotonic() - begin < 2


@pytest.mark.gpu
def test_a_step_that_does_not_end_is_given_up() -> None:
    arrival_of = torch.ones(1, device="cuda")
    torch.cuda.synchronize()
    torch.cuda._sleep(4_000_000_000)  # about two seconds
    arrival = Arrival([arrival_of])
    with pytest.raises(NoArrival):
        arrival.wait(0.3)
    assert arrival.wait(60)[0].tolist() == [1]
