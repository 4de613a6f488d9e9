"""cos and sin of positions: the kernel against torch, far out too."""

import pytest
import torch
from compile_sm90 import compile_kernel
from interpret import interpreted

from epmoe.kernels import rotary as rotary_triton
from epmoe.layers.rotary import Rope, Rotary

ROPE = Rope(64, 150000.0, 32.0, 32.0, 1.0, 4096, False, 1.3465735902799727)


def compare(device: str) -> None:
    rotary = Rotary(ROPE)
    for position_T in (torch.arange(131072 - 100, 131072), torch.arange(100), torch.tensor([70000]), torch.tensor([])):
        wanted = rotary(position_T.long())
        got = rotary_triton.cos_sin(position_T.long().to(device), rotary.frequency_F.to(device), ROPE.concentration)
        for got_TF, wanted_TF in zip(got, wanted, strict=True):
            # the angles have the same bits; cos and sin within a few units of their last place
            torch.testing.assert_close(got_TF.cpu(), wanted_TF, rtol=0, atol=5e-7)


def test_kernel_in_the_interpreter() -> None:
    interpreted(compare, "cpu")


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_compiles_without_spills(arch: int) -> None:
    """And with the accurate functions: the approximate ones know angles up to a few turns only."""
    types = {"position_ptr": "*i64", "angles": "i32", "concentration": "fp32"}
    types |= dict.fromkeys(("frequency_ptr", "cos_ptr", "sin_ptr"), "*fp32")
    constants = {"F": 32, "N": rotary_triton.ANGLES}
    assert compile_kernel(rotary_triton.cos_sin_kernel, types, constants, arch=arch)["spills"] == 0


@pytest.mark.gpu
def test_kernel_on_a_gpu() -> None:
    compare("cuda")
