"""The layout of MXFP4 weights that the Triton kernels read, and how they turn it into numbers.

Letters: L experts on this rank · N output rows · Z strips of B = 64 of them · C contraction columns · G groups of 32
columns that share a scale · P pairs of groups (64 columns) · W = 16·P words of a row · X = B·W words of a strip · V
columns of scales.

A row is cut into runs of 4 pairs, and of 2 and 1 for what is left. A run of n pairs is 64·n columns and 16·n words of
16 bits. Word i of a run holds four E2M1 codes, j = 0 … 3, of the run's columns

    16·n·j + i

so a tile of words gives four tiles of values that are neighbours in x (a run of 4 pairs: 128 bytes of bf16 each): four
products, the columns in their natural order, and nothing is ever interleaved. The scale bytes of such a tile stand
together too: 32 words (or a smaller run) share one scale word of 32 bits, whose byte j is the scale of their codes j.
A row has V of them.

In memory a strip of 64 rows lies together, run by run, the rows of a run one after the other (8 KiB for a run of 4
pairs), and its scale words likewise: what a program asks for at a time is one piece of memory. With whole rows one
after the other each row of a run was a piece of 128 bytes by itself, and products of few rows took up to a quarter
longer (scripts/bench/NOTES.md, entry 20). The last strip is filled up with zeros.

    word[l, z]:  run 0: row 0 (64 words) row 1 … row 63 | run 1: row 0 … | … | a last run of one pair: 16 words a row

Inside a word, with s the sign, a b the exponent, m the mantissa of code j:

    bit   15 14 13 12 11 10  9  8  7  6  5  4  3  2  1  0
    code  s0 b3 m3 s1 s3 a3 s2 a0 b0 m0 a1 b1 m1 a2 b2 m2

Shifted left by 0, 3 or 6 and masked with 0x81c0, codes 0 to 2 stand where a bf16 has its sign and the lowest two bits
of its exponent and the highest of its mantissa: that number is value · 2^−126, exactly, the subnormal code 0.5
included. Code 3 has the bits that are left: alone in a register and shifted right by 8 they stand so that a product
with 0x1042, the sum of their shifts by 12 (the sign), 6 (a) and 1 (b m), brings each to its place and lets no two
meet. A product with a power of two then gives value · 2^(scale − 127), again exactly: for scale bytes up to 128 one
factor 2^(scale − 1) does it, for larger ones ("wide") it would pass the largest bf16, so two factors are used, 2^126
and 2^(scale − 127). 255 is NaN.
"""

# mypy: disallow-untyped-defs=False

from dataclasses import dataclass
from functools import cache
from typing import Self

import torch
import triton
import triton.language as tl

from epmoe.formats.mxfp4 import Mxfp4Matrix

# (mask, left shift) pairs that bring the four bits of a code, sign first, to their places in a word
_PLACES = (((8, 12), (7, 6)), ((8, 9), (7, 3)), ((8, 6), (7, 0)), ((12, 8), (3, 13)))
_EXPERTS_AT_ONCE = 4  # bounds the temporary memory of a conversion
# Rows of a strip: as many as the tensor cores' left operand has, so that every tile is whole strips.
STRIP = 64


@dataclass(frozen=True)
class WordMatrix:
    """One projection [L, N, C] in words. C is padded to an even number of groups (codes 0, scale bytes 127), N to whole
    strips."""

    shape: tuple[int, int, int]
    word_LZX: torch.Tensor  # int16
    scale_LZVB: torch.Tensor  # int32
    wide: bool  # any scale byte is above 128

    @classmethod
    def pack(cls, matrix: Mxfp4Matrix) -> Self:
        """Needs memory for the result and for temporaries of a few experts. Synchronises with the host once."""
        block_LNG16, scale_LNG = matrix.blocks_LNG16, matrix.scales_LNG
        experts, rows, groups = scale_LNG.shape
        pairs, strips = (groups + 1) // 2, -(-rows // STRIP)
        word_LZX = torch.empty(experts, strips, STRIP * pairs * 16, dtype=torch.int16, device=block_LNG16.device)
        for some in torch.arange(experts).split(_EXPERTS_AT_ONCE):
            part = slice(int(some[0]), int(some[-1]) + 1)
            byte_LND = _pad_groups(block_LNG16[part], 2, 0).flatten(2)
            for first, last, size in runs(pairs):
                byte_LNRJD = byte_LND[:, :, 32 * first : 32 * last].unflatten(2, (-1, 4, 8 * size))
                word_LZX[part, :, _words_before(first) : _words_before(last)] = _strips(_words(byte_LNRJD)).flatten(2)
        padded_LNG, scales = _pad_groups(scale_LNG, 2, 127), []
        for first, last, size in runs(pairs):
            byte_LNRVJ = _scale_bytes(padded_LNG[:, :, 2 * first : 2 * last].unflatten(2, (-1, 2 * size)))
            scale_LNRV = byte_LNRVJ.clone(memory_format=torch.contiguous_format).view(torch.int32).squeeze(-1)
            scales.append(_strips(scale_LNRV).transpose(3, 4).flatten(2, 3))
        return cls((experts, rows, groups * 32), word_LZX, torch.cat(scales, dim=2), bool((scale_LNG > 128).any()))

    def unpack(self) -> Mxfp4Matrix:
        """The inverse of `pack`, exact."""
        groups = self.shape[2] // 32
        blocks, scales, column = [], [], 0
        for first, last, size in runs((groups + 1) // 2):
            count, columns = (last - first) // size, max(1, size // 2)
            words = self.word_LZX[:, :, _words_before(first) : _words_before(last)]
            blocks.append(_bytes(self._rows(words.unflatten(2, (count, STRIP, 16 * size)))).flatten(2))
            scale_LZRVB = self.scale_LZVB[:, :, column : column + count * columns].unflatten(2, (count, columns))
            scale_LNRV = self._rows(scale_LZRVB.transpose(3, 4))
            scales.append(_scale_groups(scale_LNRV.unsqueeze(-1).contiguous().view(torch.uint8), size).flatten(2))
            column += count * columns
        block_LNG16 = torch.cat(blocks, dim=2).unflatten(2, (-1, 16))[:, :, :groups].contiguous()
        return Mxfp4Matrix(block_LNG16, torch.cat(scales, dim=2)[:, :, :groups].contiguous())

    def _rows(self, x_LZRBx: torch.Tensor) -> torch.Tensor:
        """The inverse of `_strips`: [L, N, R, …]."""
        return x_LZRBx.transpose(2, 3).flatten(1, 2)[:, : self.shape[1]]

    @property
    def nbytes(self) -> int:
        return self.word_LZX.nbytes + self.scale_LZVB.nbytes


def _words_before(pair: int) -> int:
    """Words of a strip before its runs from `pair` on."""
    return STRIP * 16 * pair


def _strips(x_LNRx: torch.Tensor) -> torch.Tensor:
    """[L, N, R, …] of R runs → [L, Z, R, B, …]: strip by strip, run by run; the last strip is filled up with zeros."""
    experts, rows, *rest = x_LNRx.shape
    if missing := -rows % STRIP:
        x_LNRx = torch.cat([x_LNRx, x_LNRx.new_zeros(experts, missing, *rest)], dim=1)
    return x_LNRx.unflatten(1, (-1, STRIP)).transpose(2, 3)


def _pad_groups(tensor: torch.Tensor, dim: int, value: int) -> torch.Tensor:
    """One more group of `value` along `dim` where their number is odd."""
    if tensor.shape[dim] % 2 == 0:
        return tensor
    return torch.cat([tensor, torch.full_like(tensor.narrow(dim, 0, 1), value)], dim)


def runs(pairs: int) -> list[tuple[int, int, int]]:
    """(first pair, last + 1, pairs of a run) of the stretches of a row that have runs of one size.

    >>> runs(45)
    [(0, 44, 4), (44, 45, 1)]
    """
    found, first = [], 0
    for size in (4, 2, 1):
        if last := (pairs - first) // size * size:
            found.append((first, first + last, size))
            first += last
    return found


def _scale_bytes(scale_LNRG: torch.Tensor) -> torch.Tensor:
    """Scale bytes of the groups of R runs → [L, N, R, V, 4]: byte j of V scale words, the scale of their codes j.

    >>> [_scale_bytes(torch.arange(count)[None, None, None])[0, 0, 0].tolist() for count in (8, 4, 2)]
    [[[0, 2, 4, 6], [1, 3, 5, 7]], [[0, 1, 2, 3]], [[0, 0, 1, 1]]]
    """
    if scale_LNRG.shape[3] == 2:  # codes 0 and 1 are of the first group of a single pair, 2 and 3 of the second
        scale_LNRG = scale_LNRG.repeat_interleave(2, dim=3)
    return scale_LNRG.unflatten(3, (4, -1)).transpose(3, 4)


def _scale_groups(byte_LNRVJ: torch.Tensor, size: int) -> torch.Tensor:
    """The inverse of `_scale_bytes`, for runs of `size` pairs: [L, N, R, G]."""
    return byte_LNRVJ.transpose(3, 4).flatten(3)[..., :: 2 if size == 1 else 1]


def _words(byte_LNRJD: torch.Tensor) -> torch.Tensor:
    """Bytes uint8 [L, N, R, 4, D] of R runs, two columns each, low nibble first → words int16 [L, N, R, 2·D]."""
    two_X = torch.zeros(1, dtype=torch.int32, device=byte_LNRJD.device)
    for code, two_256 in enumerate(_tables(byte_LNRJD.device)):
        two_X = two_X | two_256.index_select(0, byte_LNRJD[..., code, :].flatten().int())
    return two_X.view(torch.int16).view(*byte_LNRJD.shape[:3], -1)


@cache
def _tables(device: torch.device) -> tuple[torch.Tensor, ...]:
    """For codes 0 to 3 of a word, int32 [256]: what a byte puts into two words, the low nibble into the lower half."""
    tables_J256 = torch.zeros(4, 256, dtype=torch.int64)
    byte_256 = torch.arange(256)
    for odd in (0, 1):
        for code, places in enumerate(_PLACES):
            for mask, shift in places:
                tables_J256[code] |= (byte_256 >> 4 * odd & mask) << shift + 16 * odd
    return tuple(tables_J256.to(torch.int32).to(device))


def _bytes(word_LNRW: torch.Tensor) -> torch.Tensor:
    """The inverse of `_words`."""
    word_LNRD2 = word_LNRW.unflatten(-1, (-1, 2))
    shape = (*word_LNRW.shape[:3], 4, word_LNRD2.shape[3])
    byte_LNRJD = word_LNRW.new_zeros(shape, dtype=torch.uint8)
    for odd in (0, 1):
        for code, places in enumerate(_PLACES):
            for mask, shift in places:
                nibble = (word_LNRD2[..., odd] >> shift) & mask
                byte_LNRJD[..., code, :] |= nibble.to(torch.uint8) << (4 * odd)
    return byte_LNRJD


@triton.jit
def words_to_values(word, scale, J: tl.constexpr, WIDE: tl.constexpr, PTX: tl.constexpr):
    """Words int16 and their scale words int32, of one shape → the bf16 values of code J (0 to 3), of that shape.

    One code at a time, so that a large tile never holds more than a quarter of its values in registers.
    """
    if PTX:
        return tl.inline_asm_elementwise(
            PTX_WIDE[J] if WIDE else PTX_NARROW[J],
            "=&r,r,r,r",
            [word, _factor(scale, J, WIDE)],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    else:
        return _value_integer(word, (scale >> (8 * J)) & 255, J)


@triton.jit
def _factor(scale, J: tl.constexpr, WIDE: tl.constexpr):
    """Of scale words int32, for codes J: int32 with the bits of 2^(scale − 1) in bf16 in its half J % 2; the other half
    has those of the code beside it.

    WIDE: in both halves 2^(scale − 127), since 2^(scale − 1) is too large for bf16.
    """
    if WIDE:
        scale = (scale >> (8 * J)) & 255
        bits = tl.where(scale == 0, 0x40, scale << 7)  # 2^−127 is subnormal
        return tl.where(scale == 255, 0x7FC0, bits) * 0x10001
    else:
        return tl.inline_asm_elementwise(PTX_FACTORS[J // 2], "=r,r", [scale], dtype=tl.int32, is_pure=True, pack=1)


# What the assembler makes of these is what limits a product of few rows, so instructions are counted (a register of
# two words): 1, 2, 2 and 4 for the bits of codes 0 to 3, one product each (two if wide), and 2 for the factors of two
# codes, which serve all the words of a scale: bytes j and j + 1 apart, then (byte + 126) << 7 in each half.
PTX_FACTORS = tl.constexpr(
    tuple(
        f"{{ .reg .b32 t; prmt.b32 t, $1, 0, {apart}; mad.lo.u32 $0, t, 128, 0x3f003f00; }}"
        for apart in ("0x4140", "0x4342")
    )
)
# $1 holds two words; the code's bits come to their places in $0. $2 and $3 are the factors of those words, and $2
# serves both: Triton hands over neighbours of a row, which share a scale. tests/kernels/test_compile.py reads in the
# comment that the registers are one.
_PTX_BITS = (
    "and.b32 $0, $1, 0x81c081c0;",
    "shl.b32 $0, $1, 3; and.b32 $0, $0, 0x81c081c0;",
    "shl.b32 $0, $1, 6; and.b32 $0, $0, 0x81c081c0;",
    "shr.u32 $0, $1, 8; and.b32 $0, $0, 0x006c006c; mul.lo.u32 $0, $0, 0x1042; and.b32 $0, $0, 0x81c081c0;",
)
# An exact product: fma with −0, since mul.bf16x2 does not exist on sm_80
_PTX_TIMES = "fma.rn.bf16x2 $0, $0, {factor}, zero;"
_PTX_HEAD = "{ .reg .b32 t, zero; .reg .b16 half<2>; mov.b32 zero, 0x80008000;"
_PTX_LIFT = "mov.b32 t, 0x7e807e80;" + _PTX_TIMES.format(factor="t")  # 2^126
# A half twice is no instruction: the product reads it so.
_PTX_HALF = "mov.b32 {{half0, half1}}, $2; mov.b32 t, {{half{0}, half{0}}};"
_PTX_SCALE = "/* factors $2 $3 */" + _PTX_TIMES + "}}"
PTX_NARROW = tl.constexpr(
    tuple(
        _PTX_HEAD + bits + _PTX_HALF.format(j % 2) + _PTX_SCALE.format(factor="t") for j, bits in enumerate(_PTX_BITS)
    )
)
PTX_WIDE = tl.constexpr(tuple(_PTX_HEAD + bits + _PTX_LIFT + _PTX_SCALE.format(factor="$2") for bits in _PTX_BITS))
_TWO_126 = tl.constexpr(2.0**126)


@triton.jit
def _value_integer(word, scale, J: tl.constexpr):
    """What the PTX computes, in Triton's own operations: for the interpreter and for devices without PTX.

    In float32, whose exponent has the same width as bf16's.
    """
    word = word.to(tl.int32)
    bits = word << (3 * J) if J < 3 else ((word >> 8) & 0x6C) * 0x1042
    small = (((bits & 0x8000) << 16) | ((bits & 0x1C0) << 16)).to(tl.float32, bitcast=True)
    scale = scale.to(tl.int32)
    factor = tl.where(scale == 0, 0x400000, tl.where(scale == 255, 0x7FC00000, scale << 23))
    value = small * _TWO_126 * factor.to(tl.float32, bitcast=True)
    # The upper half of the float32 is the bf16 number: nothing to round. (The interpreter's cast loses subnormals.)
    return (value.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
