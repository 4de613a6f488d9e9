"""Attention over the paged cache in Triton: what epmoe/layers/attention.py computes.

launch.py    what is launched for a step, and with which tiles: start reading here
decode.py    rows of a decode step: the cache read once, in splits; the splits combined
prefill.py   prompts, whole or in pieces: keys and values put into place, then attended to in blocks
softmax.py   what both share: a block's scores, the running maximum and sum
"""

from epmoe.kernels.attention.launch import cached_attention, serves

__all__ = ["cached_attention", "serves"]
