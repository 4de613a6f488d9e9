"""The inline PTX of words.py without a GPU: its instructions, carried out on integers.

A register holds two words: 2^32 pairs, so some thousands are drawn at random. test_experts.py has all bytes under all
scale bytes, for the PTX on a GPU only.
"""

import re
from collections.abc import Callable

import pytest
import torch

from epmoe.formats.mxfp4 import Mxfp4Matrix, decode
from epmoe.moe.experts.triton.words import PTX_FACTORS, PTX_NARROW, PTX_WIDE, WordMatrix

ALL = 0xFFFFFFFF
COUNT = 1 << 14  # registers


def halves(register: torch.Tensor) -> torch.Tensor:
    """The two bf16 numbers of a register, low first, as float64."""
    both = torch.stack([register & 0xFFFF, register >> 16], dim=-1)
    return (both << 16).to(torch.int32).view(torch.float32).double()


def fma_bf16x2(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    assert (c == 0x80008000).all(), "not −0, so a sum"
    product = halves(a) * halves(b)  # of 8 bits each: exact in 53
    rounded = product.bfloat16()  # one rounding, by float32: an exact product needs none, a large one becomes infinite
    bits = rounded.view(torch.int16).long() & 0xFFFF
    return bits[..., 0] | bits[..., 1] << 16


def prmt(a: torch.Tensor, b: torch.Tensor, selector: torch.Tensor) -> torch.Tensor:
    """Bytes 0 to 3 are a's and 4 to 7 b's; nibble i of the selector says which one is byte i of the result."""
    both, found = a | b << 32, torch.zeros_like(a)
    for i in range(4):
        choice = int(selector) >> 4 * i & 15
        assert choice < 8, "the mode that repeats signs"
        found |= (both >> 8 * choice & 255) << 8 * i
    return found


INSTRUCTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "mov.b32": lambda *halves: halves[0] if len(halves) == 1 else halves[0] | halves[1] << 16,
    "and.b32": lambda a, b: a & b,
    "shl.b32": lambda a, b: a << b,
    "shr.u32": lambda a, b: a >> b,
    "mul.lo.u32": lambda a, b: a * b,
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "prmt.b32": prmt,
    "fma.rn.bf16x2": fma_bf16x2,
}


def execute(ptx: str, *inputs: torch.Tensor) -> torch.Tensor:
    """$0 after the instructions; `inputs` are $1, $2 …, registers as int64 from 0 to 2^32 − 1."""
    values = {f"${i}": value for i, value in enumerate(inputs, 1)}
    body = re.fullmatch(r"{ (?:\.reg \.b\d+ [\w<>, ]+; ?)+(.*)}", ptx)
    assert body is not None, ptx
    for line in filter(None, map(str.strip, re.sub(r"/\*.*?\*/", "", body[1]).split(";"))):
        name, to, sources = re.fullmatch(r"(\S+) ({.*?}|[^,]+), (.*)", line).groups()  # type: ignore[union-attr]
        known = [
            values[each] if each in values else torch.tensor(int(each, 0)) for each in re.findall(r"[$\w]+", sources)
        ]
        result = INSTRUCTIONS[name](*known) & ALL
        if to.startswith("{"):  # its halves
            low, high = re.findall(r"\w+", to)
            values |= {low: result & 0xFFFF, high: result >> 16}
        else:
            values[to] = result
    return values["$0"]


@pytest.mark.parametrize("wide", [False, True])
def test_ptx_gives_the_values(wide: bool) -> None:
    """Two words a register, any scale byte: equal to quant.mxfp4 bit by bit."""
    generator = torch.Generator().manual_seed(5)
    # rows of one run: 64 words, 2 scale words
    block_NG16 = torch.randint(0, 256, (COUNT // 32, 8, 16), dtype=torch.uint8, generator=generator)
    scale_NG = torch.randint(0, 256 if wide else 129, (COUNT // 32, 8), dtype=torch.uint8, generator=generator)
    matrix = WordMatrix.pack(Mxfp4Matrix(block_NG16[None], scale_NG[None]))
    wanted_NJC = decode(block_NG16, scale_NG, torch.bfloat16).unflatten(1, (4, 64))
    register_NR = matrix.word_LZX.view(-1, 64).view(torch.int32).long() & ALL
    scale_NR = (matrix.scale_LZVB[0].mT.flatten(0, 1).long() & ALL).repeat_interleave(16, dim=1)
    for j in range(4):
        byte_NR = scale_NR >> 8 * j & 255
        if wide:  # 2^(scale − 127), as `_factor` makes it in Triton's own operations
            bits = torch.where(byte_NR == 0, 0x40, torch.where(byte_NR == 255, 0x7FC0, byte_NR << 7))
            factor_NR = bits * 0x10001
        else:
            factor_NR = execute(PTX_FACTORS.value[j // 2], scale_NR)
            assert torch.equal(factor_NR >> 16 * (j % 2) & 0xFFFF, byte_NR + 126 << 7)
        value_NR = execute((PTX_WIDE if wide else PTX_NARROW).value[j], register_NR, factor_NR, factor_NR)
        value_NC = value_NR.to(torch.int32).view(torch.bfloat16)
        nan_NC = wanted_NJC[:, j].isnan()
        assert torch.equal(value_NC.isnan(), nan_NC) and nan_NC.any() == wide
        bits_NC, wanted_NC = (value.view(torch.int16)[~nan_NC] for value in (value_NC, wanted_NJC[:, j].contiguous()))
        assert torch.equal(bits_NC, wanted_NC), f"code {j}"
