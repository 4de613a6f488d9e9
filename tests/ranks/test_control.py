"""Control: orders come in order, a turn after they were sent, whatever their length and however long nothing comes."""

import threading
import time
from typing import Any

import pytest
from spawn import run_ranks

from epmoe.ranks.control import HEAD, SIZE, Control
from epmoe.ranks.mesh import Ranks

EMPTY = len('{"x": ""}')
LENGTHS = [0, 1, SIZE - HEAD - EMPTY - 1, SIZE - HEAD - EMPTY, SIZE - HEAD - EMPTY + 1, 3 * SIZE, 10**6, 2]


def turns(ranks: Ranks) -> list[Any]:
    control = Control(ranks, 20)
    sent: list[dict[str, Any]] = [{}, *({"x": "y" * length} for length in LENGTHS), {}, {"stop": True}]
    found = []
    for _ in range(2):  # it may go on after it has settled
        found += [control.turn(each if control.leads else None) for each in [*sent, {}]]
        control.settle()
    assert found == [{}, *sent] * 2
    return found


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_rank_gets_them_a_turn_late(size: int) -> None:
    first, *others = run_ranks(turns, size)
    assert all(each == first for each in others)


def test_a_rank_alone_gets_them_at_once() -> None:
    (found,) = run_ranks(alone, 1)
    assert found == [{"a": 1}, {}, {"b": 2}]


def alone(ranks: Ranks) -> list[Any]:
    control = Control(ranks, 1)
    assert not control.travelling
    return [control.turn(each) for each in ({"a": 1}, {}, {"b": 2})]


def idle(ranks: Ranks, timeout_s: float) -> Any:
    """Heartbeats for longer than the group's timeout, then an order; then silence, until all but rank 0 have ended."""
    control = Control(ranks, timeout_s)
    for _ in range(6):
        if control.leads:
            time.sleep(control.beat_s)
        control.turn({} if control.leads else None)
    control.turn({"x": 1} if control.leads else None)
    found = control.turn({} if control.leads else None)
    begin = time.monotonic()
    if control.leads:
        control.settle()
        ranks.barrier()
        return found, 0.0
    control.turn()
    with pytest.raises(RuntimeError):
        control.turn()
    waited_s = time.monotonic() - begin
    ranks.barrier()
    return found, waited_s


@pytest.mark.alone
def test_an_idle_group_lives_on_and_a_silent_one_ends() -> None:
    timeout_s = 2.5
    (first, _), (second, waited_s) = run_ranks(idle, 2, timeout_s)
    assert first == second == {"x": 1}
    assert waited_s > 0.8 * timeout_s


def reports(ranks: Ranks) -> list[list[Any]]:
    """Each rank says something from a thread, while rank 0 sends nothing."""
    control, heard, enough = Control(ranks, 20), [], threading.Event()

    def hear(*said: Any) -> None:
        heard.append([*said])
        if len(heard) == 3 * ranks.size:
            enough.set()

    control.listen(hear)
    ranks.barrier()  # else a report may come before anybody listens
    for number in range(3):
        threading.Thread(target=control.report, args=(ranks.rank, number, "é" * 1000)).start()
    if control.leads:
        assert enough.wait(50)
    ranks.barrier()
    return sorted(heard)


@pytest.mark.parametrize("size", [1, 3])
def test_what_ranks_report_comes_to_rank_0(size: int) -> None:
    first, *others = run_ranks(reports, size)
    assert first == [[rank, number, "é" * 1000] for rank in range(size) for number in range(3)]
    assert others == [[]] * (size - 1)
