"""What the choice of tokens adds to a decode step: the same step again and again, greedily and as asked, in turns.

Two answers of which one is sampled say other things, go to other experts, and so take steps of other lengths: on
gpt-oss-20b's shapes with random weights by some percent at a batch of 256, more than the choice itself takes. So here
every step begins with the same tokens at the same positions, which a copy on the device brings back.
"""

import statistics
import time

import torch

from epmoe.bench.conditions import Record
from epmoe.engine.engine import Engine
from epmoe.engine.request import Level, Request, Variant
from epmoe.ranks.mesh import Ranks

STEPS, TURNS = 20, 7  # of a turn; of each way


def measure_choice(engine: Engine, ranks: Ranks, requests: list[Request]) -> Record:
    """ms of such a step with the greedy choice, and the share that the requests' own choice adds; nothing of
    log-probabilities, which are made behind the step, nor where ranks have requests of their own. A collective."""
    own = Variant.joined([Variant.of(each.params) for each in requests])
    if own.logits or len(engine.scheduler.lanes) > 1:
        return {}
    for request in requests:
        engine.add(request)
    while engine.scheduler.waiting or not all(each.ids for each in engine.scheduler.running):
        engine.step()
    handles = [each.handle for each in engine.scheduler.running]
    assert len(handles) == len(requests), "a request has ended, or was put back"
    places = engine.runner.state.sequences[:2]
    kept = [each.clone() for each in places]

    def turn(variant: Variant) -> float:
        """Seconds of a step."""
        ranks.barrier()
        synchronize(ranks)
        begin = time.perf_counter()
        for _ in range(STEPS):
            for place, before in zip(places, kept, strict=True):
                place.copy_(before)
            if variant.adjusted:
                engine.graphs.rows(handles)
                engine.graphs.head(len(handles), variant)
            else:
                engine.graphs.decode(handles, variant)
        synchronize(ranks)
        return (time.perf_counter() - begin) / STEPS

    ways = Variant(Level.GREEDY, logits=False), own
    with torch.inference_mode():
        times = [[turn(variant) for variant in ways] for _ in range(TURNS)]
        for place, before in zip(places, kept, strict=True):
            place.copy_(before)
    engine.clear()
    greedy, chosen = (statistics.median(each) for each in zip(*times, strict=True))
    return {"greedy_ms": 1e3 * greedy, "above_greedy": chosen / greedy - 1}


def synchronize(ranks: Ranks) -> None:
    if ranks.device.type != "cpu":
        torch.accelerator.synchronize(ranks.device)
