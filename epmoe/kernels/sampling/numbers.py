"""Numbers of the choice, as epmoe/layers/sampling.py has them: keys, weights, a row's parameters.

Nothing here divides in float64, which is a subroutine, and each program of each launch would wait for it.
"""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

MOST = tl.constexpr(3.4028234663852886e38)
MOST_IDS, ID = tl.constexpr(1 << 20), tl.constexpr((1 << 20) - 1)  # ID: its bits in a key, all flipped
NOTHING = tl.constexpr(-(1 << 63))  # below every key
NOT_FINITE = tl.constexpr(0x7FFFFFFF)  # the bits of a best score that is none
UNIT = tl.constexpr(float(1 << 40))
# A float64 below 2^52 added to it stands, rounded, in the mantissa.
MAGIC, MANTISSA = tl.constexpr(float(1 << 52)), tl.constexpr((1 << 52) - 1)
ROUNDING = tl.constexpr(1.5 * (1 << 52))  # likewise, of either sign: the difference is the nearest whole number
REACH = tl.constexpr(28.5)  # what is so many temperatures below the best weighs nothing: ln 2^41 is 28.42
LOG2_E = tl.constexpr(1.4426950408889634)
STEEPEST = tl.constexpr(100.0)  # temperatures between the best score and `floor`; with one token more it weighs nothing
RECIPROCAL = tl.constexpr(0x7FDE6238502484BA)  # less a float64's bits: nearly those of 1 / it
# 2^x on [-1/2, 1/2], least error (2^-52) of a polynomial of degree 10; the first coefficient is 1.
POWER_1, POWER_2 = tl.constexpr(0.69314718055995), tl.constexpr(0.24022650695910097)
POWER_3, POWER_4 = tl.constexpr(0.05550410866444772), tl.constexpr(0.009618129107606888)
POWER_5, POWER_6 = tl.constexpr(0.0013333558230164974), tl.constexpr(0.0001540353044173605)
POWER_7, POWER_8 = tl.constexpr(1.5252657260200837e-05), tl.constexpr(1.321544258792169e-06)
POWER_9, POWER_10 = tl.constexpr(1.0208690299958306e-07), tl.constexpr(7.072585949269223e-09)
LOW = tl.constexpr(0xFFFFFFFF)
GOLDEN = tl.constexpr(0x9E3779B97F4A7C15 - (1 << 64))  # as epmoe/layers/sampling.py has them, with a sign
MIX_1, MIX_2 = tl.constexpr(0xBF58476D1CE4E5B9 - (1 << 64)), tl.constexpr(0x94D049BB133111EB - (1 << 64))


@triton.jit
def ordered(value):
    """int32 that rise as float32 values do. -0 counts as 0."""
    value = tl.where(value == 0, 0.0, value)
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def value_of(bits):
    """What `ordered` was made of."""
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def key_of(value, id):
    return ordered(value).to(tl.int64) * MOST_IDS + (id ^ ID)


@triton.jit
def key_id(key):
    return ((key & ID) ^ ID).to(tl.int32)


@triton.jit
def key_value(key):
    return value_of((key >> 20).to(tl.int32))


@triton.jit
def slope(best, temperature, inverse):
    """steep, floor: what weighs something is above `floor`, float32, and halves with 1 / `steep` less, float64.

    Where the next smaller float32 is hundreds of temperatures below the best, nothing between them weighs anything:
    there it falls less steeply, and a power of two stays a float64.
    """
    reach = best.to(tl.float64) - REACH * temperature
    floor = tl.maximum(tl.minimum(reach, MOST), -MOST).to(tl.float32)
    floor = tl.where(floor.to(tl.float64) >= reach, value_of(ordered(floor) - 1), floor)
    floor = tl.maximum(floor, -MOST)
    gap = best.to(tl.float64) - floor.to(tl.float64)
    # An eighth more or less than 1 / gap, by the bits of its exponent.
    bits = -gap.to(tl.int64, bitcast=True) + RECIPROCAL
    steep = bits.to(tl.float64, bitcast=True) * STEEPEST
    return tl.where(gap * inverse > STEEPEST, steep, inverse) * LOG2_E, floor


@triton.jit
def weight_of(score, best, steep, floor):
    """int64: round(2^40 · exp((score - best) / temperature)), of no score above `best`; 0 of -infinity.

    As a power of two by its nearest whole exponent and a polynomial: a third of the operations of a library's exp.
    """
    exponent = (tl.maximum(score, floor).to(tl.float64) - best.to(tl.float64)) * steep
    whole = exponent + ROUNDING
    rest = exponent - (whole - ROUNDING)
    power = POWER_10 * rest + POWER_9
    power = power * rest + POWER_8
    power = power * rest + POWER_7
    power = power * rest + POWER_6
    power = power * rest + POWER_5
    power = power * rest + POWER_4
    power = power * rest + POWER_3
    power = power * rest + POWER_2
    power = power * rest + POWER_1
    power = power * rest + 1.0
    # Where even `floor` is the best score, -infinity still weighs nothing.
    whole = whole.to(tl.int64, bitcast=True).to(tl.int32) + tl.where(score > -float("inf"), 40, -100)
    power = (power.to(tl.int64, bitcast=True) + (whole.to(tl.int64) << 52)).to(tl.float64, bitcast=True)
    return (power + MAGIC).to(tl.int64, bitcast=True) & MANTISSA


@triton.jit
def best_key(key_ptr, b, parts, SP: tl.constexpr):
    """The largest of a row's keys."""
    s_S = tl.arange(0, SP)
    return tl.max(tl.load(key_ptr + b * parts + s_S, s_S < parts, other=NOTHING), 0)


@triton.jit
def candidate_keys(row_ptr, candidate_ptr, real_C, ROOM: tl.constexpr):
    """Keys of a row's candidates, in no order; NOTHING, where none is `real`."""
    id_C = tl.load(candidate_ptr + tl.arange(0, ROOM), real_C, other=0)
    return tl.where(real_C, key_of(tl.load(row_ptr + id_C, real_C, other=0), id_C), NOTHING)


@triton.jit
def parameters(value_ptr, handle, ids):
    """Temperature and its inverse, top-k, top-p, the least weight by min-p; whether top-k and top-p are there."""
    value_ptr += handle * 5
    temperature, inverse = tl.load(value_ptr), tl.load(value_ptr + 4)
    top_k = tl.minimum(tl.load(value_ptr + 1), ids * 1.0).to(tl.int32)  # a single id is the compiler's own
    top_p = tl.maximum(tl.load(value_ptr + 2), 2.0**-61)  # as good as any less, and a float32
    least = tl.ceil(tl.load(value_ptr + 3) * UNIT).to(tl.int64)
    by_k = (top_k > 0) & (top_k < ids)
    return temperature, inverse, top_k, top_p, least, by_k, top_p < 1


@triton.jit
def scores(logits_ptr, stride, adjusted_ptr, adjusted_stride, kind_ptr, handle, b):
    """Where a row's scores stand: adjusted ones, where its sequence needs that."""
    row_ptr = logits_ptr + b * stride
    if tl.load(kind_ptr + handle) != 0:
        row_ptr = adjusted_ptr + b * adjusted_stride
    return row_ptr


@triton.jit
def shifted(z, BITS: tl.constexpr):
    """A logical shift of int64 to the right."""
    return (z >> BITS) & ((1 << (64 - BITS)) - 1)


@triton.jit
def mix(z):
    """SplitMix64's finaliser."""
    z = (z ^ shifted(z, 30)) * MIX_1
    z = (z ^ shifted(z, 27)) * MIX_2
    return z ^ shifted(z, 31)


@triton.jit
def scaled(bits, total):
    """floor(bits · total / 2^64), the bits without a sign."""
    high, low = shifted(bits, 32), bits & LOW
    above, below = total >> 32, total & LOW
    middle = high * below + shifted(low * below, 32)
    other = low * above + (middle & LOW)
    return high * above + shifted(middle, 32) + shifted(other, 32)
