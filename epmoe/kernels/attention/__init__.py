"""Attention over the paged cache in Triton: what epmoe/layers/attention.py computes.

launch.py    what is launched for a step, and with which tiles: start reading here
decode.py    sequences that bring one token: the cache read once, in splits; the splits combined
prefill.py   sequences that bring several: keys and values put into place, then attended to in blocks
softmax.py   what both share: a block's scores, the running maximum and sum
"""

from epmoe.kernels.attention.launch import cached_attention, serves

__all__ = ["cached_attention", "serves"]
