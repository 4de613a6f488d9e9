"""cos and sin of a step's positions in one Triton kernel: what `layers.rotary.cos_sin` computes.

Letters: T tokens of a step · F frequencies.
"""

# mypy: disallow-untyped-defs=False

import torch
import triton
import triton.language as tl

# Angles of one program.
ANGLES = 1024


def serves(position_T: torch.Tensor) -> bool:
    """Any positions."""
    return True


def cos_sin(
    position_T: torch.Tensor, frequency_F: torch.Tensor, concentration: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos_TF and sin_TF, float32, of position · frequency, times the concentration."""
    assert position_T.is_contiguous() and frequency_F.is_contiguous() and frequency_F.dtype == torch.float32
    tokens, frequencies = len(position_T), len(frequency_F)
    cos_TF, sin_TF = (torch.empty(tokens, frequencies, device=position_T.device) for _ in range(2))
    if tokens:
        grid = (triton.cdiv(tokens * frequencies, ANGLES),)
        cos_sin_kernel[grid](
            position_T, frequency_F, cos_TF, sin_TF, tokens * frequencies, concentration, F=frequencies, N=ANGLES
        )
    return cos_TF, sin_TF


@triton.jit(do_not_specialize=["angles"])
def cos_sin_kernel(
    position_ptr,  # int64 [T]
    frequency_ptr,  # float32 [F]
    cos_ptr,  # out float32 [T, F]
    sin_ptr,  # out float32 [T, F]
    angles,  # T·F
    concentration,
    F: tl.constexpr,
    N: tl.constexpr,
):
    """float32 throughout, like every public implementation: far out, the rounding of an angle is visible."""
    at_N = tl.program_id(0) * N + tl.arange(0, N)
    real_N = at_N < angles
    position_N = tl.load(position_ptr + at_N // F, real_N, other=0).to(tl.float32)
    angle_N = position_N * tl.load(frequency_ptr + at_N % F, real_N, other=0)
    tl.store(cos_ptr + at_N, tl.cos(angle_N) * concentration, real_N)
    tl.store(sin_ptr + at_N, tl.sin(angle_N) * concentration, real_N)
