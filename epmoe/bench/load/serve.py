"""A server without its network: rank 0's callers beside the service's loop, which all ranks run."""

import statistics
import threading
import time
from collections.abc import Sequence

from epmoe.bench.load.callers import LOOK_S, Callers, Served
from epmoe.engine.request import Request
from epmoe.engine.service import Service
from epmoe.llm import LLM
from epmoe.ranks.control import Control, Orders
from epmoe.ranks.mesh import Ranks


class Timed(Control):
    """Knows what its turns have taken."""

    def __init__(self, ranks: Ranks, timeout_s: float) -> None:
        super().__init__(ranks, timeout_s)
        self.ranks, self.taken_us = ranks, list[int]()

    def turn(self, orders: Orders | None = None) -> Orders:
        begin = time.perf_counter()
        due = super().turn(orders)
        self.taken_us.append(round(1e6 * (time.perf_counter() - begin)))
        return due

    def cost_us(self) -> float:
        """What a turn takes when all ranks are there: of each, the rank counts that came last; then the median.

        A collective.
        """
        by_rank = self.ranks.gather(self.taken_us)
        return statistics.median(map(min, zip(*by_rank, strict=True))) if self.taken_us else 0.0


def serve(
    llm: LLM, service: Service, conversations: Sequence[Sequence[Request]], at_s: Sequence[float] | None, users: int
) -> list[Served]:
    """Hold these conversations (`Callers`); what became of each request, on rank 0. A collective.

    Raises:
        UserError: the model's numbers are none for some prompt.
    """
    if not llm.ranks.is_main:
        llm.serve(service)
        return []
    callers = Callers(service, llm.tokenizer, conversations, at_s, users)
    thread = threading.Thread(target=callers.run, name="epmoe-callers", daemon=True)
    thread.start()
    try:
        llm.serve(service)
    except BaseException as error:
        service.fail(error)
        raise
    finally:
        thread.join(2 * LOOK_S)  # it has stopped the service, or is told that there is none
    if callers.error is not None:
        raise callers.error
    return callers.served
