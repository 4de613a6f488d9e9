"""MXFP4 bit by bit, against tables made with fractions from the specification's words.

A wrong value here is a wrong weight in every expert; the model still writes, only worse. So nothing is compared with a
tolerance, and the expected values come from arithmetic that shares nothing with the code under test.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from epmoe.errors import UserError
from epmoe.formats import SCALES
from epmoe.formats.mxfp4 import Mxfp4Matrix, decode, encode

FLOAT32_LIMIT = Fraction(2) ** 128  # the first magnitude that float32 and bfloat16 round to infinity, for our mantissas


def e2m1(nibble: int) -> Fraction:
    """A nibble's magnitude: sign, 2 exponent bits with bias 1, 1 mantissa bit; exponent 0 is subnormal."""
    exponent, mantissa = nibble >> 1 & 3, nibble & 1
    return Fraction(mantissa, 2) if exponent == 0 else (1 + Fraction(mantissa, 2)) * 2 ** (exponent - 1)


def expected_value(nibble: int, scale: int) -> float:
    sign = -1.0 if nibble & 8 else 1.0
    if scale == 255:
        return math.nan
    magnitude = e2m1(nibble) * Fraction(2) ** (scale - 127)
    return math.copysign(math.inf if magnitude >= FLOAT32_LIMIT else float(magnitude), sign)


def all_pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """Every byte with every scale: blocks [256, 16, 16] and scales [256, 16]; row s has scale s and all 256 bytes."""
    every = torch.arange(256, dtype=torch.uint8)
    return every.view(1, 16, 16).repeat(256, 1, 1), every.view(256, 1).repeat(1, 16)


def same_values(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bits, signs of zeros included; every NaN equals every NaN."""
    nan = a.isnan()
    return torch.equal(nan, b.isnan()) and torch.equal(
        torch.where(nan, 0, a.float().view(torch.int32)), torch.where(nan, 0, b.float().view(torch.int32))
    )


# Decoding.


def check_decode(dtype: torch.dtype, device: str) -> None:
    blocks, scales = all_pairs()
    actual = decode(blocks.to(device), scales.to(device), dtype)
    assert actual.dtype == dtype and actual.shape == (256, 512)
    nibbles = [nibble for byte in range(256) for nibble in (byte & 15, byte >> 4)]
    table = [[expected_value(nibble, scale) for nibble in nibbles] for scale in range(256)]
    assert same_values(actual.cpu(), torch.tensor(table, dtype=torch.float64).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_of_all_bytes_and_scales(dtype: torch.dtype) -> None:
    check_decode(dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_of_all_bytes_and_scales_on_the_gpu(dtype: torch.dtype) -> None:
    check_decode(dtype, "cuda")


def test_low_nibble_first_by_an_example() -> None:
    blocks = torch.zeros(1, 16, dtype=torch.uint8)
    blocks[0, :2] = torch.tensor([0x2F, 0x91])
    value = decode(blocks, torch.tensor([128], dtype=torch.uint8), torch.float32)
    assert value[:4].tolist() == [-12.0, 2.0, 1.0, -1.0]


def test_documented_overflow() -> None:
    """The file's docstring: 2, 3, 4, 6 at s = 254 and 4, 6 at s = 253, and nothing else, become infinity."""
    blocks, scales = all_pairs()
    infinite = decode(blocks, scales, torch.float32).isinf().view(256, 512)
    codes = {s: {int(nibble) for nibble in _nibbles(blocks[s])[infinite[s]].tolist()} for s in range(256)}
    assert {s: {float(e2m1(n)) for n in found} for s, found in codes.items() if found} == {
        253: {4.0, 6.0},
        254: {2.0, 3.0, 4.0, 6.0},
    }


def _nibbles(blocks: torch.Tensor) -> torch.Tensor:
    return torch.stack([blocks & 15, blocks >> 4], -1).flatten(-3)


# Encoding.


def expected_code(value: float, scale: int) -> int:
    """Nearest of the eight magnitudes in units of the scale, ties to the even code; beyond 6 is 6."""
    ratio = abs(Fraction(value)) / Fraction(2) ** (scale - 127)
    distance = [(abs(ratio - e2m1(code)), code & 1, code) for code in range(8)]
    return min(distance)[2] | (8 if math.copysign(1.0, value) < 0 else 0)


def expected_scale(values: list[float]) -> int:
    """127 + floor(log2(max)) - 2, not below 0. frexp gives max = m·2^e with m in [0.5, 1), so floor(log2) = e - 1."""
    largest = max(map(abs, values))
    return max(0, 127 + math.frexp(largest)[1] - 1 - 2) if largest else 0


def check_encode(values: list[float], device: str = "cpu") -> None:
    blocks, scales = encode(torch.tensor(values, dtype=torch.float32, device=device))
    scale = expected_scale(values)
    assert scales.tolist() == [scale]
    assert _nibbles(blocks.cpu()).tolist() == [expected_code(value, scale) for value in values]


MIDPOINTS = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
GROUPS = {
    "magnitudes": [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0] * 4,
    "negative_zeros": [-0.0, 6.0] * 16,
    "midpoints": [*MIDPOINTS, *(-m for m in MIDPOINTS), 4.0] + [0.0] * 17,
    "saturating": [7.99, -7.99, 6.01, 7.0, 6.0, 5.01, 4.99, -5.0] * 4,
    "power_of_two": [4.0, 3.999, 2.0, 0.1] * 8,
    "all_zeros": [0.0] * 32,
    "zeros_of_both_signs": [0.0, -0.0] * 16,
    "float32_subnormals": [2.0**-149, -(2.0**-149), 2.0**-127, 3 * 2.0**-128] * 8,
    "smallest_normal_scale": [2.0**-126, 2.0**-125, 6 * 2.0**-127, 2.0**-128] * 8,
    "half_of_the_smallest_code": [2.0**-129, 3 * 2.0**-129, 2.0**-127, 2.0**-130] * 8,
    "largest_floats": [3.4028234663852886e38, -3.4028234663852886e38, 1.5 * 2.0**127, 2.0**100] * 8,
    "one_outlier": [1e30] + [1e-30] * 31,
}


@pytest.mark.parametrize("name", GROUPS)
def test_encode_of_chosen_groups(name: str) -> None:
    check_encode([float(torch.tensor(value)) for value in GROUPS[name]])


@pytest.mark.gpu
@pytest.mark.parametrize("name", GROUPS)
def test_encode_of_chosen_groups_on_the_gpu(name: str) -> None:
    check_encode([float(torch.tensor(value)) for value in GROUPS[name]], "cuda")


float32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
ordinary = st.floats(-8, 8, width=32)
eighths = st.integers(-64, 64).map(lambda n: n / 8)  # ties are frequent among these


@settings(max_examples=200, deadline=None)
@given(st.one_of(*(st.lists(element, min_size=32, max_size=32) for element in (float32, ordinary, eighths))))
def test_encode_of_any_group(values: list[float]) -> None:
    check_encode(values)


def test_neighbours_of_midpoints_round_to_the_nearest() -> None:
    """One float32 step to either side of a tie decides it."""
    for midpoint in MIDPOINTS:
        tie = torch.tensor(midpoint)
        for value in (torch.nextafter(tie, torch.tensor(0.0)), tie, torch.nextafter(tie, torch.tensor(9.0))):
            check_encode([float(value), *[4.0] * 31])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_encode_of_short_floats(dtype: torch.dtype) -> None:
    value = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    for actual, expected in zip(encode(value), encode(value.float()), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("scale", SCALES)
def test_a_nan_makes_its_group_nan(scale: str) -> None:
    value = torch.ones(64)
    value[3] = math.nan
    blocks, scales = encode(value, scale=scale)
    assert scales.tolist() == [255, 125]
    decoded = decode(blocks, scales, torch.float32)
    assert bool(decoded[:32].isnan().all()) and torch.equal(decoded[32:], value[32:])


@pytest.mark.parametrize("scale", SCALES)
def test_infinities_come_back(scale: str) -> None:
    value = torch.zeros(32)
    value[:5] = torch.tensor([math.inf, -math.inf, 2.0**127, 3 * 2.0**126, 1.0])
    blocks, scales = encode(value, scale=scale)
    assert scales.tolist() == [253]
    assert decode(blocks, scales, torch.float32)[:5].tolist() == [math.inf, -math.inf, 2.0**127, 3 * 2.0**126, 0.0]


@pytest.mark.parametrize("columns", [1, 31, 48])
def test_columns_that_groups_do_not_divide(columns: int) -> None:
    with pytest.raises(UserError, match=f"{columns} columns.*multiple of 32.*quant=bf16"):
        encode(torch.zeros(2, columns))
    with pytest.raises(UserError, match=f"experts.down_proj: {columns} columns"):
        Mxfp4Matrix.stored("experts.down_proj", (2, 3, columns))


# Other scales than the specification's.


def up_codes(values: list[float]) -> tuple[list[int], int]:
    """Codes and scale by `up`: the least power of two that 6 times reaches all, ties away from zero."""
    largest, scale = max(abs(Fraction(value)) for value in values), 1 if any(values) else 0
    while any(values) and 6 * Fraction(2) ** (scale - 127) < largest:
        scale += 1
    codes = []
    for value in values:
        ratio = abs(Fraction(value)) / Fraction(2) ** (scale - 127)
        distance = [(abs(ratio - e2m1(code)), -code) for code in range(8)]
        codes.append(-min(distance)[1] | (8 if math.copysign(1.0, value) < 0 else 0))
    return codes, scale


def check_up(values: list[float], device: str = "cpu") -> None:
    blocks, scales = encode(torch.tensor(values, dtype=torch.float32, device=device), scale="up")
    assert (_nibbles(blocks.cpu()).tolist(), scales.tolist()[0]) == up_codes(values)


@pytest.mark.parametrize("name", GROUPS)
def test_up_of_chosen_groups(name: str) -> None:
    check_up([float(torch.tensor(value)) for value in GROUPS[name]])


@settings(max_examples=100, deadline=None)
@given(st.one_of(*(st.lists(element, min_size=32, max_size=32) for element in (float32, ordinary, eighths))))
def test_up_of_any_group(values: list[float]) -> None:
    check_up(values)


@pytest.mark.gpu
@pytest.mark.parametrize("name", GROUPS)
def test_up_of_chosen_groups_on_the_gpu(name: str) -> None:
    check_up([float(torch.tensor(value)) for value in GROUPS[name]], "cuda")


def test_up_by_an_example() -> None:
    """7 is beyond 6: the scale doubles, and 2.5 of it, a tie, goes away from zero. 6 itself is reached."""
    for largest, wanted in ((7.0, [8.0, 6.0, 6.0, -6.0]), (6.0, [6.0, 6.0, 4.0, -6.0])):
        value = torch.tensor([largest, 5.0, 4.0 if largest < 7 else 5.5, -5.0] + [0.0] * 28)
        assert decode(*encode(value, scale="up"), torch.float32)[:4].tolist() == wanted


def group_errors(value: torch.Tensor, scale: str) -> torch.Tensor:
    """Each group's sum of squared errors, in float64."""
    return (
        (decode(*encode(value, scale=scale), torch.float32).double() - value).square().unflatten(-1, (-1, 32)).sum(-1)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_best_has_the_lowest_error_of_every_group(dtype: torch.dtype) -> None:
    """Of any distribution, at any size of values; sums in float32 may take two errors of 7 digits for each other."""
    generator = torch.Generator().manual_seed(5)
    normal, uniform = torch.randn(500, 96, generator=generator), torch.rand(500, 96, generator=generator) - 0.5
    exponent = torch.randint(-110, 110, (500, 1), generator=generator)
    for value in (normal, uniform, normal**3, torch.ldexp(normal, exponent), torch.zeros(2, 64)):
        value = value.to(dtype)
        ocp, up, best = (group_errors(value, scale) for scale in SCALES)
        assert (best <= torch.minimum(ocp, up) * (1 + 1e-6)).all()
        if value.any():
            assert (best < ocp).any() and (best < up).any(), "each of the others is the worse one somewhere"


def test_errors_of_normal_weights() -> None:
    """Each rule's relative RMS error on a million normal values; three digits, so another rule would show."""
    value = torch.randn(31250, 32, generator=torch.Generator().manual_seed(0))
    found = {scale: float(group_errors(value, scale).sum().sqrt() / value.double().norm()) for scale in SCALES}
    assert found == {
        "ocp": pytest.approx(0.115, abs=5e-4),
        "up": pytest.approx(0.1155, abs=5e-4),
        "best": pytest.approx(0.1115, abs=5e-4),
    }


def test_best_makes_no_infinities() -> None:
    """A wider scale of the largest numbers would."""
    value = torch.full((1, 32), 1.99 * 2.0**127)
    assert decode(*encode(value, scale="best"), torch.float32).isfinite().all()


def test_up_loses_only_what_its_smallest_scale_does() -> None:
    blocks, scales = all_pairs()
    value = decode(blocks[2:253], scales[2:253], torch.float32)
    value = value[value.isfinite().all(-1)]
    assert len(value) == 251 and same_values(decode(*encode(value, scale="up"), torch.float32), value)


# Both ways.


@pytest.mark.parametrize("scale", ["ocp", "best"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encoding_decoded_values_returns_them(dtype: torch.dtype, scale: str) -> None:
    value = decode(*all_pairs(), dtype)
    assert same_values(decode(*encode(value, scale=scale), dtype), value)


@settings(max_examples=300, deadline=None)
@given(
    block=st.binary(min_size=16, max_size=16),
    scale=st.one_of(st.integers(0, 255), st.sampled_from([0, 1, 2, 3, 251, 252, 253, 254, 255])),
)
def test_encoding_any_decoded_group_returns_it(block: bytes, scale: int) -> None:
    """Random groups mix magnitudes that all_pairs never puts together."""
    blocks = torch.frombuffer(bytearray(block), dtype=torch.uint8).view(1, 16)
    value = decode(blocks, torch.tensor([scale], dtype=torch.uint8), torch.float32)
    assert same_values(decode(*encode(value), torch.float32), value)


def test_bfloat16_holds_what_float32_holds() -> None:
    assert same_values(decode(*all_pairs(), torch.bfloat16), decode(*all_pairs(), torch.float32))


# Large tensors.


class LargestTemporary(TorchDispatchMode):
    """Records the bytes of the largest tensor that an operation creates, results excepted."""

    def __init__(self, *result_bytes: int) -> None:
        super().__init__()
        self.result_bytes, self.bytes = result_bytes, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.untyped_storage().nbytes() not in self.result_bytes:
            self.bytes = max(self.bytes, out.untyped_storage().nbytes())
        return out


def test_chunks_bound_the_temporaries_and_change_nothing() -> None:
    """A layer of gpt-oss-120b has two thousand million values; its conversion must not need them in float32 at once."""
    value = torch.randn(3, 40, 96, generator=torch.Generator().manual_seed(1))
    blocks, scales = encode(value)
    decoded = decode(blocks, scales, torch.float32)
    others = {scale: encode(value, scale=scale) for scale in ("up", "best")}
    with LargestTemporary(value.nbytes, blocks.nbytes, scales.nbytes) as peak:
        for actual, expected in zip(encode(value, 1024), (blocks, scales), strict=True):
            assert torch.equal(actual, expected)
        for scale in ("up", "best"):
            for actual, expected in zip(encode(value, 1024, scale), others[scale], strict=True):
                assert torch.equal(actual, expected)
        assert torch.equal(decode(blocks, scales, torch.float32, 1024), decoded)
    assert 1024 * 4 <= peak.bytes <= 1024 * 8


@pytest.mark.gpu
@pytest.mark.usefixtures("settled_device")
def test_peak_device_memory() -> None:
    """Conversion needs its result and at most 16 bytes for each of `chunk_values` values."""
    value = torch.randn(4, 2880, 2880, device="cuda", dtype=torch.bfloat16)
    decode(*encode(value[:1, :1]), torch.bfloat16)  # tables and library workspaces
    matrix = Mxfp4Matrix.quantize(value)
    conversions: list[Callable[[], Mxfp4Matrix | torch.Tensor]]
    conversions = [partial(Mxfp4Matrix.quantize, value, scale) for scale in SCALES]
    conversions.append(partial(matrix.dequantize, torch.bfloat16))
    for convert in conversions:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = convert()
        extra = torch.cuda.max_memory_allocated() - before - result.nbytes
        assert extra <= 16 * Mxfp4Matrix.chunk_values, f"{extra / 1e6:.0f} MB"
        del result


def test_no_groups_at_all() -> None:
    blocks, scales = encode(torch.zeros(0, 4, 64))
    assert blocks.shape == (0, 4, 2, 16) and scales.shape == (0, 4, 2)
    assert decode(blocks, scales, torch.float32).shape == (0, 4, 64)


def test_stored_names_and_shapes_are_those_of_gpt_oss() -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert Mxfp4Matrix.stored(name, (32, 5760, 2880)) == {
        f"{name}_blocks": ((32, 5760, 90, 16), torch.uint8),
        f"{name}_scales": ((32, 5760, 90), torch.uint8),
    }
