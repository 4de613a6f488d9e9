"""What travels in a layer between the ranks: which collectives, and how many bytes a rank brings to and gets from each.

    mesh.attention   attention                       experts, combine=slots
    replicate        nothing                         all_reduce of all slots' rows
    tensor           all_gather of heads             the same
    data             nothing                         all_gather of tokens and router's logits, reduce_scatter of rows
      all_to_all                                     large steps: all_to_all of sizes, tokens, choices and rows

Rows that GPUs of a node add up in symmetric memory are as many bytes, and no collective of a process group.

Letters: T tokens of a step, with `data` of each rank · H hidden · E experts · K experts per token · N ranks.
"""

from dataclasses import dataclass
from math import comb
from typing import NamedTuple

WORD = 8  # bytes of a number of rows


class Message(NamedTuple):
    """A collective, and the bytes of one rank's tensors."""

    collective: str
    brings: int
    gets: int


@dataclass(frozen=True)
class Sizes:
    """Of a layer, as far as its traffic follows from them."""

    hidden: int
    heads: int  # values of all query heads together
    num_experts: int
    top_k: int
    itemsize: int  # bytes of a value
    ranks: int


def traffic(layer: Sizes, attention: str, combine: str, tokens: int, *, parted: bool = False) -> list[Message]:
    """The messages of one layer of a step, in their order; none where there is one rank.

    Args:
        parted: with all_to_all, that the step is large enough; tokens then choose any experts with equal chance, so
            that its bytes are what is to be expected.
    """
    if layer.ranks == 1 or not tokens:
        return []
    token, slots = tokens * layer.hidden * layer.itemsize, 1 if combine == "all_reduce" else layer.top_k
    found = []
    if attention == "tensor":
        heads = tokens * layer.heads * layer.itemsize
        found.append(Message("all_gather", heads // layer.ranks, heads))
    if attention != "data":
        return [*found, Message("all_reduce", token * slots, token * slots)]
    if combine == "all_to_all" and parted:
        wanted = round(tokens * wanting(layer))
        about = 2 * layer.top_k * 4  # of each choice an expert and a weight
        sizes = 2 * layer.ranks * WORD
        return [
            Message("all_to_all", sizes, sizes),
            Message("all_to_all", wanted * layer.hidden * layer.itemsize, wanted * layer.hidden * layer.itemsize),
            Message("all_to_all", wanted * about, wanted * about),
            Message("all_to_all", token * layer.top_k, token * layer.top_k),
        ]
    logits = tokens * layer.num_experts * layer.itemsize
    return [
        Message("all_gather", token, token * layer.ranks),
        Message("all_gather", logits, logits * layer.ranks),
        Message("reduce_scatter", token * slots * layer.ranks, token * slots),
    ]


def wanting(layer: Sizes) -> float:
    """Ranks that want a token, this one perhaps among them, as expected where it chooses any K experts.

    >>> round(wanting(Sizes(2880, 4096, 32, 4, 2, 8)), 2)
    3.44
    """
    elsewhere = layer.num_experts - layer.num_experts / layer.ranks
    return layer.ranks * (1 - comb(round(elsewhere), layer.top_k) / comb(layer.num_experts, layer.top_k))
