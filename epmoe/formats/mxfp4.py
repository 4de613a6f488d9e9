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

**Encoding** takes the specification's scale, s - 127 = floor(log2(largest magnitude)) - 2 (2 is the exponent of E2M1's
largest power of two, 4), not below s = 0, and rounds each value to the nearest of the sixteen, ties to the even
mantissa; magnitudes beyond 6·scale become 6·scale. The cases which that leaves open:

    all zeros     s = 0, signs kept
    a NaN         the whole group becomes NaN (s = 255)
    an infinity   s = 253, where 6·scale overflows: infinities come back as infinities. The group's other values are
                  rounded at that scale, 2^126, so small ones become zero.

So encode(decode(x)) has the values of x for all bytes and scales (the bytes may differ: 1·2^0 is also 4·2^-2).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Self

import torch

from epmoe.errors import UserError
from epmoe.formats import ReadExperts

GROUP = 32  # values that share a scale

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
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


def encode(values: torch.Tensor, chunk_values: int = CHUNK_VALUES) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest MXFP4 values, ties to even, with the scale rule at the top of this file.

    Args:
        values: floating point [..., C] of at most float32's precision.

    Returns:
        blocks uint8 [..., C/32, 16] and scales uint8 [..., C/32]; temporaries are bounded by `chunk_values`.

    Raises:
        UserError: C is not a multiple of 32.
    """
    assert values.dtype in (torch.float32, torch.bfloat16, torch.float16), values.dtype
    *lead, columns = values.shape
    groups = _groups("encode", columns)
    scales = torch.empty((*lead, groups), dtype=torch.uint8, device=values.device)
    blocks = torch.empty((*lead, groups, GROUP // 2), dtype=torch.uint8, device=values.device)
    value_M32, block_M16, scale_M = values.reshape(-1, GROUP), blocks.view(-1, GROUP // 2), scales.view(-1)
    for part in _chunks(scale_M.numel(), chunk_values // GROUP):
        block_M16[part], scale_M[part] = _encode_groups(value_M32[part].float())
    return blocks, scales


def _encode_groups(value_M32: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    magnitude_M32 = value_M32.abs()
    largest_M = magnitude_M32.amax(-1)
    # float32's exponent field is floor(log2) + 127, so the scale rule is a subtraction; subnormals read 0: clamped.
    scale_M = ((largest_M.view(torch.int32) >> 23) - 2).clamp_(min=0)
    scale_M.masked_fill_(largest_M.isinf(), _INF_SCALE).masked_fill_(largest_M.isnan(), _NAN_SCALE)
    ratio_M32 = magnitude_M32.mul_(_inverse_scales(value_M32.device).index_select(0, scale_M)[:, None])
    # The code of a magnitude is how many midpoints of neighbours lie below it. A midpoint itself goes to the even code.
    code_M32 = (ratio_M32 > 0.25).to(torch.uint8)
    code_M32 += ratio_M32 >= 0.75
    code_M32 += ratio_M32 > 1.25
    code_M32 += ratio_M32 >= 1.75
    code_M32 += ratio_M32 > 2.5
    code_M32 += ratio_M32 >= 3.5
    code_M32 += ratio_M32 > 5.0
    code_M32 |= value_M32.signbit().to(torch.uint8) << 3
    return code_M32[:, 0::2] | code_M32[:, 1::2] << 4, scale_M.to(torch.uint8)


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
    def quantize(cls, value_LNC: torch.Tensor) -> Self:
        """Encode values.

        Raises:
            UserError: C is not a multiple of 32.
        """
        return cls(*encode(value_LNC, cls.chunk_values))

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
