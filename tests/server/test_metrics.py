"""Metrics: figures of replicas, which may be lost."""

import re

from epmoe.engine.figures import Figures
from epmoe.server.frames import Load
from epmoe.server.metrics import Metrics


def figures(replica: int, running: int, steps: int) -> Figures:
    return Figures(1, 10, running, 0, 0, 8, 4, steps, steps / 10, replica=replica)


def value(metrics: Metrics, name: str) -> float:
    (found,) = re.findall(rf"^{re.escape(name)} (\S+)$", metrics.text().decode(), re.MULTILINE)
    return float(found)


def test_a_lost_replica_runs_nothing_and_has_done_what_it_has() -> None:
    """A counter that went back would be taken for one that begins anew, and all that the others did for new."""
    loads = [Load([figures(0, 2, 100), figures(1, 3, 70)]), Load([figures(0, 4, 120)])]
    metrics = Metrics("m", lambda: loads[0])
    assert (value(metrics, "epmoe_replicas"), value(metrics, "epmoe_steps_total")) == (2, 170)
    assert value(metrics, 'epmoe_replica_steps_total{replica="1"}') == 70
    del loads[0]
    assert (value(metrics, "epmoe_replicas"), value(metrics, "epmoe_requests_running")) == (1, 4)
    assert value(metrics, "epmoe_steps_total") == 190
    assert value(metrics, "epmoe_step_seconds_total") == 19
