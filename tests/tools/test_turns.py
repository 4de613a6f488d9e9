"""Turns: tests share them, and one that wants to be alone is, after those that run already and before all others."""

from fcntl import LOCK_EX, LOCK_NB, LOCK_UN, flock
from pathlib import Path
from threading import Thread
from time import monotonic, sleep

from turns import Turns


def wait_until_the_door_is_shut(folder: Path) -> None:
    deadline = monotonic() + 30
    with (folder / "door").open() as door:
        while True:
            try:
                flock(door, LOCK_EX | LOCK_NB)
            except BlockingIOError:
                return
            flock(door, LOCK_UN)
            assert monotonic() < deadline
            sleep(0.01)


def test_turns(tmp_path: Path) -> None:
    first, second, alone, late = (Turns(tmp_path) for _ in range(4))
    order: list[str] = []

    def take(turns: Turns, name: str, *, alone: bool) -> None:
        turns.take(alone=alone)
        order.append(name)

    take(first, "first", alone=False)
    take(second, "second", alone=False)  # at the same time
    waiting = Thread(target=take, args=(alone, "alone"), kwargs={"alone": True})
    waiting.start()
    wait_until_the_door_is_shut(tmp_path)
    behind = Thread(target=take, args=(late, "late"), kwargs={"alone": False})
    behind.start()
    first.end()
    sleep(0.1)
    assert order == ["first", "second"]  # another one runs still
    second.end()
    waiting.join(30)
    alone.take(alone=True)  # the turn that was not ended goes on
    sleep(0.1)
    assert order == ["first", "second", "alone"]
    alone.end()
    behind.join(30)
    assert order == ["first", "second", "alone", "late"]
    late.end()
