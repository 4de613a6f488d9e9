"""What is fast, in Triton: the functions of epmoe/layers under the same file names, names and signatures.

Which of the two runs is decided in one place, epmoe/layers/twin.py, by what each file here says it serves:

    serves(x) -> bool       whether these kernels compute with such rows of x: their dtype, their number

This file imports no triton, so that a machine without a GPU can ask.

    norm.py             the residual sum, its norm, for few tokens the router's logits too, in one kernel
    linear.py           attention's projections
    rotary.py           cos and sin of a step's positions
    attention/          decode and prefill over the paged cache
    vocabulary.py       the projection to the vocabulary
    greedy.py           the largest logit of each row
    sampling/           tokens drawn: top-k, top-p, min-p, penalties; log-probabilities
    product.py          rows times a weight, in one order of summation for any number of rows
    few.py              the same for very few rows
    runs.py             the same in the router's order
    vendor.py          the library's products, where they have the same bits
    ways.py             which of these serves how many rows
    sequence_state.py   what surrounds the model in a step
    capture.py          CUDA graphs
    compile_ahead.py    all kernels of a start compiled in parallel
    symmetric.py        memory that the GPUs of one node map into each other
    gpu.py              a GPU's generation; kernels that begin before the one in front has ended
"""

import torch


def run_on(device: torch.device) -> bool:
    """Whether a device is one that Triton compiles these kernels for."""
    return device.type == "cuda"


def powers(most: int) -> list[int]:
    """Powers of two up to `most`, and `most`; nothing below 1.

    >>> powers(20), powers(16), powers(0)
    ([1, 2, 4, 8, 16, 20], [1, 2, 4, 8, 16], [])
    """
    found = [2**power for power in range(most.bit_length())]
    return found if most in (0, *found) else [*found, most]


def distinct(tokens: int) -> set[int]:
    """Numbers of tokens, up to `tokens`, at which some kernel is compiled anew.

    At the finest, kernels have tiles by powers of two of a step's tokens, and are compiled anew for sizes that 16
    divides.

    >>> sorted(distinct(10))
    [1, 2, 3, 4, 7, 8, 9, 10]
    """
    sizes = powers(tokens)
    return {*sizes, *(size - 1 for size in sizes[1:])}


def native(x: torch.Tensor) -> bool:
    """Whether x has the dtype that kernels for few rows are made for: bf16; float32 in Triton's interpreter.

    The interpreter, which is what runs a kernel on a CPU, cannot multiply bf16.
    """
    return x.dtype == (torch.float32 if x.device.type == "cpu" else torch.bfloat16)
