"""The choice of tokens in Triton: what epmoe/layers/sampling.py defines, in passes that sort nothing.

launch.py    the launches, and what they leave for each other: start reading here
scan.py      a row's adjusted scores, its best one, its lowest one
narrow.py    which scores the border of top-k or top-p lies between; the exact sums around it
border.py    the border, among the few candidates that are left
draw.py      the token; the log-probabilities
numbers.py   what all share: keys, weights, a row's parameters
"""

from epmoe.kernels.sampling.launch import choose, serves, top_logprobs

__all__ = ["choose", "serves", "top_logprobs"]
