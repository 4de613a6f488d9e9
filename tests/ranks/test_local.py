"""Orders of rank 0 to the ranks that it has started: lines in a pipe."""

import json
import os
import time

import pytest

from epmoe.errors import UserError
from epmoe.ranks.admission import STARTED, age_s
from epmoe.ranks.local import Orders


def test_orders_come_whole_however_they_are_cut() -> None:
    read, write = os.pipe()
    orders = Orders(os.fdopen(read, "rb", buffering=0))
    long = {"call": "x", "text": "é" * 5000}
    os.write(write, b'{"call": "a"}\n{"call"')
    assert orders.next() == {"call": "a"}
    begin = time.monotonic()
    assert orders.next(0.1) is None and 0.1 <= time.monotonic() - begin < 30
    os.write(write, b': "b"}\n' + json.dumps(long).encode() + b"\n")
    assert orders.next(60) == {"call": "b"} and orders.next() == long
    os.close(write)
    with pytest.raises(UserError, match="rank 0 has gone without a word"):
        orders.next()


def test_ranks_that_are_started_late_are_young(monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook may be hours old: waits for the others' start count from there."""
    assert age_s() > 0.5
    monkeypatch.setenv(STARTED, str(started := time.monotonic()))
    age = age_s()
    assert age <= time.monotonic() - started
