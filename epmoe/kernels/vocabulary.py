"""The projection of few rows to the vocabulary in Triton: what vocabulary.py computes, in one launch.

It reads the weight once, nearly as fast as memory gives it. A program makes the logits of N ids for all tokens, with
the weight as the left operand of the product: then tensor cores step through H in the same order for any number of
tokens, and one accumulator takes the steps in that order. So a logit's bits depend neither on the part of the
vocabulary nor, among the batches that come here, on the batch.

Letters: T tokens · H hidden · V vocabulary · N ids of a program · M tokens, rounded up · K columns of a step along H.
"""

# mypy: disallow-untyped-defs=False

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from epmoe.kernels import native

# Up to so many rows one kernel is faster than the library's products of chunks: on one H200, 201,088 x 2,880, 263 µs
# against 307 for 1 row, 304 against 342 for 64. More were not measured.
MOST_ROWS = 64


class VocabularyTile(NamedTuple):
    """What a program works on, and how."""

    tokens: int  # the most; a power of two, 16 at least
    rows: int  # ids of a program
    depth: int  # columns of a step along H
    warps: int
    stages: int


# On one H200, for 201,088 x 2,880: steps of 128 columns take 263, 271, 280 and 336 µs for 1, 4, 16 and 64 tokens, steps
# of 64 take 270, 274, 283 and 304. Tiles are few, so that all are compiled before the first request: which one a step
# takes follows from the count of its tokens alone, and the decode steps that are run first have all counts.
TILES = (
    VocabularyTile(16, 64, 128, 4, 4),
    VocabularyTile(32, 64, 128, 4, 4),
    VocabularyTile(MOST_ROWS, 64, 64, 4, 5),
)


def serves(x_TH: torch.Tensor) -> bool:
    """Whether the logits of these rows are computed here.

    The library's products round otherwise, so a row's last bits may differ between steps of up to MOST_ROWS rows and
    larger ones; they are the same on all ranks, and on any number of them.
    """
    return native(x_TH) and len(x_TH) <= MOST_ROWS


def part_logits(x_TH: torch.Tensor, weight_VH: torch.Tensor, part: tuple[int, int], chunk: int) -> torch.Tensor:
    """As `layers.vocabulary.part_logits`, for up to MOST_ROWS tokens and any part, whatever the chunk; one launch."""
    (tokens, hidden), (vocab, _), (first, last) = x_TH.shape, weight_VH.shape, part
    assert tokens <= MOST_ROWS and weight_VH.shape[1] == hidden and 0 <= first < last <= vocab, (x_TH.shape, part)
    assert x_TH.dtype == weight_VH.dtype and x_TH.is_contiguous() and weight_VH.is_contiguous()
    logits_TV = torch.empty(tokens, vocab, dtype=torch.float32, device=x_TH.device)
    if tokens:
        tile = next(tile for tile in TILES if tokens <= tile.tokens)
        few_logits_kernel[(triton.cdiv(last - first, tile.rows),)](
            x_TH,
            weight_VH,
            logits_TV,
            tokens,
            first,
            vocab,
            HIDDEN=hidden,
            N=tile.rows,
            M=tile.tokens,
            K=tile.depth,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return logits_TV[:, first:last]


# Specialising first and vocab compiles nothing twice: parts begin at multiples of the chunk, and a model has one vocab.
@triton.jit(do_not_specialize=["tokens"])
def few_logits_kernel(
    x_ptr,  # [T, H]
    weight_ptr,  # [V, H]
    logits_ptr,  # out float32 [T, V]
    tokens,
    first,
    vocab,
    HIDDEN: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
):
    """Program n: the logits of N ids from `first` + n·N on, also where the part ends within them."""
    n_N = first + tl.program_id(0) * N + tl.arange(0, N)
    m_M, k_K = tl.arange(0, M), tl.arange(0, K)
    real_N, real_M = n_N < vocab, m_M < tokens
    weight_NK = weight_ptr + n_N.to(tl.int64)[:, None] * HIDDEN + k_K[None, :]
    x_MK = x_ptr + m_M[:, None] * HIDDEN + k_K[None, :]
    sum_NM = tl.zeros([N, M], tl.float32)
    for k in range(0, HIDDEN, K):
        real_K = k + k_K < HIDDEN
        w_NK = tl.load(weight_NK + k, real_N[:, None] & real_K[None, :], other=0)
        t_MK = tl.load(x_MK + k, real_M[:, None] & real_K[None, :], other=0)
        sum_NM = tl.dot(w_NK, tl.trans(t_MK), sum_NM, input_precision="ieee")  # of float32 operands; bf16's are exact
    at_NM = logits_ptr + m_M[None, :].to(tl.int64) * vocab + n_N[:, None]
    tl.store(at_NM, sum_NM, real_N[:, None] & real_M[None, :])
