"""MXFP4: 32 four-bit values share one scale byte (Open Compute Project, Microscaling Formats v1.0).

Letters: L experts on this rank · E experts · N output rows of a matrix · C its contraction columns · G = C/32 groups of
values that share a scale.

A group of 32 neighbouring values along C is 16 bytes and one scale byte s:

    byte j        bits 3..0 value 2j (low nibble first), bits 7..4 value 2j+1
    nibble        sign · 2 exponent bits · 1 mantissa bit (E2M1): ±{0, 0.5, 1, 1.5, 2, 3, 4, 6}
    s (E8M0)      2^(s-127) for 0 ≤ s ≤ 254; 255 is NaN

**Decoding** is exact, in float32 and in bfloat16 alike: a value has one mantissa bit, and both hold it down to the
smallest product 0.5·2^-127, a subnormal. What leaves their range becomes infinity, as any product does: 2, 3, 4, 6 at
s = 254 and 4, 6 at s = 253. Zeros keep their sign and stay zero at every scale but NaN. Every value of a group with
s = 255 is NaN.

**Encoding** picks a group's scale by one of three rules, and rounds each value to the nearest of the sixteen;
magnitudes beyond 6·scale become 6·scale. m is the group's largest magnitude.

    ocp     s - 127 = floor(log2 m) - 2, the specification's rule (2 is the exponent of E2M1's largest power of two,
            4): up to a quarter of m may be cut off. Ties go to the even mantissa.
    up      s - 127 = ceil(log2(m / 6)): nothing is cut off, and the values stand farther apart. Ties go away from
            zero. This is the conversion of the community's kernels (`downcast_to_mxfp_torch` in
            kernels-community/gpt-oss-triton-kernels), which transformers calls, bit for bit where values are finite.
    best    of ocp's s and s + 1, of which `up` takes one, that with the smaller sum of squared errors of the group; the
            former where both are equal. Ties go to the even mantissa.

s is not below 0, by up not below 1 but for zeros. The cases which that leaves open:

    all zeros     s = 0, signs kept
    a NaN         the whole group becomes NaN (s = 255)
    an infinity   s = 253, where 6·scale overflows: infinities come back as infinities. The group's other values are
                  rounded at that scale, 2^126, so small ones become zero.

So by ocp and best encode(decode(x)) has the values of x for all bytes and scales (the bytes may differ: 1·2^0 is also
4·2^-2); by up for scales from 2 to 252.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import ClassVar, Self

import torch

from epmoe.errors import UserError
from epmoe.formats import SCALES, ReadExperts

GROUP = 32  # values that share a scale

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Between two neighbours, and whether the code below it is odd: then the even one is above.
_MIDPOINTS = tuple(((a + b) / 2, code % 2 == 1) for code, (a, b) in enumerate(pairwise(_MAGNITUDES)))
_E2M1 = (*_MAGNITUDES, *(-value for value in _MAGNITUDES))
_NAN_SCALE, _INF_SCALE = 255, 253

# Decoding and encoding run through a large tensor this many values at a time. Their temporaries are at most 16 bytes a
# value, so 67 MB, whatever the tensor's size.
CHUNK_VALUES = 1 << 22


def decode(
    blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, chunk_values: int = CHUNK_VALUES
) -> torch.Tensor:
    """value = E2M1(nibble) · 2^(scale - 127), exact; see above for overflow and NaN.

    Args:
        blocks: uint8 [..., G, 16].
        scales: uint8 [..., G].
        dtype: float32 or bfloat16.

    Returns:
        [..., G·32]; temporaries are bounded by `chunk_values`.
    """
    assert blocks.dtype == scales.dtype == torch.uint8
    assert blocks.shape == (*scales.shape, GROUP // 2), f"{tuple(blocks.shape)} blocks, {tuple(scales.shape)} scales"
    pair_256, scale_256 = _decode_tables(dtype, blocks.device)
    value = torch.empty((*scales.shape, GROUP), dtype=dtype, device=blocks.device)
    value_M32, block_M16, scale_M = value.view(-1, GROUP), blocks.reshape(-1, GROUP // 2), scales.reshape(-1)
    for part in _chunks(scale_M.numel(), chunk_values // GROUP):
        pair = pair_256.index_select(0, block_M16[part].flatten().int())
        scale = scale_256.index_select(0, scale_M[part].int())
        torch.mul(pair.view(dtype).view(-1, GROUP), scale[:, None], out=value_M32[part])
    return value.flatten(-2)


def encode(
    values: torch.Tensor, chunk_values: int = CHUNK_VALUES, scale: str = "ocp"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest MXFP4 values, with one of the rules at the top of this file.

    Args:
        values: floating point [..., C] of at most float32's precision.
        scale: one of SCALES.

    Returns:
        blocks uint8 [..., C/32, 16] and scales uint8 [..., C/32]; temporaries are bounded by `chunk_values`.

    Raises:
        UserError: C is not a multiple of 32.
    """
    assert values.dtype in (torch.float32, torch.bfloat16, torch.float16) and scale in SCALES, (values.dtype, scale)
    *lead, columns = values.shape
    groups = _groups("encode", columns)
    scales = torch.empty((*lead, groups), dtype=torch.uint8, device=values.device)
    blocks = torch.empty((*lead, groups, GROUP // 2), dtype=torch.uint8, device=values.device)
    value_M32, block_M16, scale_M = values.reshape(-1, GROUP), blocks.view(-1, GROUP // 2), scales.view(-1)
    step = chunk_values // (4 if scale == "best" else 1)  # which holds both, and their errors
    for part in _chunks(scale_M.numel(), max(1, step // GROUP)):
        block_M16[part], scale_M[part] = _encode_groups(value_M32[part].float(), scale)
    return blocks, scales


def _encode_groups(value_M32: torch.Tensor, scale: str) -> tuple[torch.Tensor, torch.Tensor]:
    ratio_M32 = value_M32.abs()
    largest_M = ratio_M32.amax(-1)
    # float32's exponent field is floor(log2) + 127, so a rule is a subtraction or a carry; subnormals read 0: clamped.
    if scale == "up":
        scale_M = (largest_M / 6.0).view(torch.int32).add_(0x7FFFFF) >> 23
    else:
        scale_M = ((largest_M.view(torch.int32) >> 23) - 2).clamp_(min=0)
    scale_M.masked_fill_(largest_M.isinf(), _INF_SCALE).masked_fill_(largest_M.isnan(), _NAN_SCALE)
    ratio_M32.mul_(_inverse_scales(value_M32.device).index_select(0, scale_M)[:, None])
    code_M32 = _codes(ratio_M32, away=scale == "up")
    if scale == "best":
        half_M32 = ratio_M32 / 2
        other_M32 = _codes(half_M32, away=False)
        # Beyond, the wider scale's largest values are infinities. A NaN is less than nothing, so such groups stay.
        wider_M = (4 * _error(half_M32, other_M32) < _error(ratio_M32, code_M32)) & (scale_M < _INF_SCALE - 1)
        code_M32, scale_M = torch.where(wider_M[:, None], other_M32, code_M32), scale_M + wider_M.int()
    code_M32 |= value_M32.signbit().to(torch.uint8) << 3
    return code_M32[:, 0::2] | code_M32[:, 1::2] << 4, scale_M.to(torch.uint8)


def _codes(ratio_M32: torch.Tensor, *, away: bool) -> torch.Tensor:
    """Codes of magnitudes in units of their scale: uint8.

    A code is how many midpoints of neighbours lie below. A midpoint itself goes to the even code, or `away` from zero.
    """
    code_M32 = torch.zeros_like(ratio_M32, dtype=torch.uint8)
    for midpoint, odd_below in _MIDPOINTS:
        code_M32 += ratio_M32 >= midpoint if odd_below or away else ratio_M32 > midpoint
    return code_M32


def _error(ratio_M32: torch.Tensor, code_M32: torch.Tensor) -> torch.Tensor:
    """A group's sum of squared errors, in units of its scale: [M]."""
    magnitude_8 = torch.tensor(_MAGNITUDES, device=ratio_M32.device)
    return (magnitude_8.index_select(0, code_M32.flatten().int()).view_as(ratio_M32) - ratio_M32).square_().sum(1)


def _chunks(groups: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, groups)) for start in range(0, groups, step))


def _groups(name: str, columns: int) -> int:
    if columns % GROUP:
        raise UserError(
            f"{name}: {columns} columns cannot be stored in mxfp4, which needs a multiple of {GROUP}: choose quant=bf16"
        )
    return columns // GROUP


@cache
def _decode_tables(dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The two values of each byte, as one integer of their joint width (one look-up a byte), and each scale's value."""
    word = {torch.float32: torch.int64, torch.bfloat16: torch.int32}[dtype]
    pairs = [[_E2M1[byte & 15], _E2M1[byte >> 4]] for byte in range(256)]
    scales = [2.0 ** (s - 127) for s in range(255)] + [float("nan")]
    pair_256 = torch.tensor(pairs, dtype=dtype).view(word).squeeze(-1)
    return pair_256.to(device), torch.tensor(scales, dtype=dtype).to(device)


@cache
def _inverse_scales(device: torch.device) -> torch.Tensor:
    # 254 is never chosen; 0 at 255 turns the rest of a NaN's group into zeros.
    return torch.tensor([2.0 ** (127 - s) for s in range(254)] + [0.0, 0.0], dtype=torch.float32).to(device)


@dataclass(frozen=True)
class Mxfp4Matrix:
    """One projection of L experts in MXFP4, as the checkpoint stores it."""

    format: ClassVar[str] = "mxfp4"
    chunk_values: ClassVar[int] = CHUNK_VALUES  # bounds a conversion's temporaries

    blocks_LNG16: torch.Tensor  # uint8
    scales_LNG: torch.Tensor  # uint8

    def __post_init__(self) -> None:
        assert self.blocks_LNG16.dtype == self.scales_LNG.dtype == torch.uint8
        assert self.blocks_LNG16.shape == (*self.scales_LNG.shape, GROUP // 2) and self.scales_LNG.dim() == 3
        assert self.blocks_LNG16.device == self.scales_LNG.device

    @property
    def shape(self) -> tuple[int, int, int]:
        """Logical (L, N, C)."""
        experts, rows, groups = self.scales_LNG.shape
        return experts, rows, groups * GROUP

    @property
    def nbytes(self) -> int:
        return self.blocks_LNG16.nbytes + self.scales_LNG.nbytes

    @property
    def device(self) -> torch.device:
        return self.blocks_LNG16.device

    def to(self, device: torch.device) -> Self:
        return type(self)(self.blocks_LNG16.to(device), self.scales_LNG.to(device))

    def select(self, experts: slice) -> Self:
        """Some of the L experts, as a view."""
        return type(self)(self.blocks_LNG16[experts], self.scales_LNG[experts])

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The values [L, N, C], exact in float32 and bfloat16."""
        return decode(self.blocks_LNG16, self.scales_LNG, dtype, self.chunk_values)

    def finite_L(self) -> torch.Tensor:
        """Of each expert whether all its values are numbers: bool [L].

        By the scales alone, of which the last three hold infinities and NaN; a checkpoint has no numbers of that size.
        """
        return (self.scales_LNG < _INF_SCALE).flatten(1).all(1)

    @classmethod
    def quantize(cls, value_LNC: torch.Tensor, scale: str = "ocp") -> Self:
        """Encode values by a rule of SCALES.

        Raises:
            UserError: C is not a multiple of 32.
        """
        return cls(*encode(value_LNC, cls.chunk_values, scale))

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """Join along L."""
        return cls(torch.cat([part.blocks_LNG16 for part in parts]), torch.cat([part.scales_LNG for part in parts]))

    @classmethod
    def stored(cls, name: str, shape: tuple[int, int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """`<name>_blocks` [E, N, C/32, 16] and `<name>_scales` [E, N, C/32].

        Raises:
            UserError: C is not a multiple of 32.
        """
        experts, rows, columns = shape
        groups = _groups(name, columns)
        return {
            f"{name}_blocks": ((experts, rows, groups, GROUP // 2), torch.uint8),
            f"{name}_scales": ((experts, rows, groups), torch.uint8),
        }

    @classmethod
    def read(cls, name: str, experts: Sequence[int], read: ReadExperts) -> Self:
        """Matrix `name` of the given experts, through `read`."""
        return cls(read(f"{name}_blocks", experts), read(f"{name}_scales", experts))
