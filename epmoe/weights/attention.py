"""mesh.attention=auto: which ways of attention over the ranks fit into memory, and of those the one whose steps are
predicted to be the shortest.

The prediction is for a full batch of texts in mid-length: bytes that a rank reads, products and sums that it does, and
messages, by a small table of what a machine can do. It has to tell ways apart, not to be a step's time.

Letters: B texts that run at a time · C positions that a text attends to · N ranks.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from epmoe.layers.heads import HeadPart, can_share
from epmoe.models import ModelConfig
from epmoe.moe.traffic import Sizes, traffic
from epmoe.ranks.memory import free_bytes
from epmoe.ranks.mesh import Ranks
from epmoe.streams import tell
from epmoe.weights.source import Source

AUTO = "auto"
TEXT = 2048  # positions of a text for which there shall be room
KEPT = 0.1  # of what is free, for all that is neither weights nor cache


class Machine(NamedTuple):
    """What a kind of mesh can do: bytes a second from memory, FLOP a second, bytes a second between ranks, and µs of a
    message: the sum of slots, in symmetric memory on a node; an all-gather; another collective of the group."""

    memory: float
    flops: float
    link: float
    sum_us: float
    gather_us: float
    other_us: float


# One node: NVIDIA H200 over NVLink; an all-reduce of 24 MB was measured to take 101 µs on 2 ranks and 127 on 4, of one
# token 10 and 14. What follows for the process group's from decode steps of 2 ranks with 1, 64 and 256 texts stands in
# scripts/bench/NOTES.md, entry 45. The rest is an estimate; over nodes it is for 400 Gbit/s a GPU.
NODE = {2: Machine(4.2e12, 6e14, 2.6e11, 10.0, 12.0, 34.0), 4: Machine(4.2e12, 6e14, 2.1e11, 14.0, 16.0, 38.0)}
LARGER, NODES = Machine(4.2e12, 6e14, 2.1e11, 20.0, 22.0, 44.0), Machine(4.2e12, 6e14, 4e10, 40.0, 40.0, 60.0)


@dataclass(frozen=True)
class Way:
    """A way of attention over N ranks: of all key/value heads, and of all requests, the share that a rank has."""

    name: str
    heads: float = 1.0  # and of q, k and v's weights
    requests: float = 1.0


class Need(Protocol):
    """What the configuration's group `runtime` says of it."""

    @property
    def max_batch(self) -> int: ...
    @property
    def cache_tokens(self) -> int: ...


def attention_of(wanted: str, model: ModelConfig, source: Source, ranks: Ranks, run: Need) -> str:
    """What mesh.attention stands for; a collective where it is auto, and rank 0 says what that chose.

    Raises:
        UserError: `tensor` on as many ranks as cannot share the model's heads.
    """
    size = ranks.expert_size
    if wanted == "tensor":
        HeadPart.of(model.heads, model.kv_heads, 0, size)
    if wanted != AUTO:
        return wanted
    if size == 1:
        return "replicate"
    ways = [Way("replicate"), Way("data", requests=1 / size)]
    if can_share(model.heads, model.kv_heads, size):
        ways.insert(1, Way("tensor", heads=max(1 / size, 1 / model.kv_heads)))
    neighbours = ranks.neighbours if ranks.device.type == "cpu" else 1  # they share the host's memory
    # Of all replicas, which must not choose each another way.
    free = min(each for (each,) in ranks.gather_all([int(free_bytes(ranks.device) // neighbours * (1 - KEPT))]))
    itemsize = 4 if ranks.device.type == "cpu" else 2
    needs = {way.name: need(way, model, source, itemsize, run) + experts(source) // size for way in ways}
    fitting = [way for way in ways if needs[way.name] <= free]
    if fitting and ranks.device.type == "cpu":
        chosen = fitting[0]  # the table is of GPUs
    elif fitting:
        times = {way.name: predicted_us(way, model, ranks, run.max_batch) for way in fitting}
        chosen = min(fitting, key=lambda way: times[way.name])
    else:
        chosen = min(ways, key=lambda way: needs[way.name])
    if ranks.is_main:
        left = ", ".join(way.name for way in ways if way not in fitting)
        tell(f"epmoe: mesh.attention={chosen.name} (auto{f': {left} would not fit' if left else ''})")
    return chosen.name


def experts(source: Source) -> int:
    """Bytes of all experts as they are stored."""
    return sum(info.nbytes for name, info in source.tensors.items() if ".experts." in name)


def need(way: Way, model: ModelConfig, source: Source, itemsize: int, run: Need) -> int:
    """Bytes of a rank's other weights, and of its cache for as many texts as may run, TEXT positions each."""
    stored = sum(info.nbytes // info.dtype.itemsize for name, info in source.tensors.items() if ".experts." not in name)
    shared = model.layers * projected(model) * (1 - way.heads)
    positions = run.cache_tokens or run.max_batch * min(TEXT, model.max_positions) * way.requests
    windows = sum(min(window or TEXT, TEXT) / TEXT for window in model.windows)
    cache = positions * windows * position(model) * way.heads
    return int((stored - shared + cache) * itemsize)


def predicted_us(way: Way, model: ModelConfig, ranks: Ranks, batch: int) -> float:
    """Of the parts of a decode step in which the ways differ."""
    size, itemsize = ranks.expert_size, torch.bfloat16.itemsize
    machine = NODES if ranks.nodes > 1 else NODE.get(size, LARGER)
    layer = Sizes(model.hidden, model.heads * model.head_dim, model.num_experts, model.top_k, itemsize, size)
    rows = max(1.0, batch * way.requests)
    attended = sum(min(window or TEXT // 2, TEXT // 2) for window in model.windows)
    weights = projected(model) * way.heads + model.heads * model.head_dim * model.hidden
    read = (model.layers * weights + rows * attended * position(model) * way.heads) * itemsize
    done = 2 * rows * model.layers * weights
    messages = traffic(layer, way.name, "slots", max(1, round(rows)))
    each_us = {"all_reduce": machine.sum_us, "all_gather": machine.gather_us}
    sent = sum(
        each_us.get(each.collective, machine.other_us) + 1e6 * max(each.brings, each.gets) / machine.link
        for each in messages
    )
    return 1e6 * max(read / machine.memory, done / machine.flops) + model.layers * sent


def projected(model: ModelConfig) -> int:
    """Weights of a layer's q, k and v."""
    return model.hidden * (model.heads + 2 * model.kv_heads) * model.head_dim


def position(model: ModelConfig) -> int:
    """Values of a position's keys and values in a layer."""
    return 2 * model.kv_heads * model.head_dim
