"""Rotary positions with YaRN: the table of frequencies against what the checkpoint's numbers mean."""

import math

import pytest
import torch

from epmoe.layers.rotary import Llama3Rope, Rope
from epmoe.models.gpt_oss import GptOssConfig
from tests.models.test_gpt_oss import PUBLISHED

ROPES = [
    Rope(64, 150000.0, 32.0, 32.0, 1.0, 4096, False, 1.0),
    Rope(64, 150000.0, 32.0, 32.0, 1.0, 4096, True, 1.0),
    Rope(16, 10000.0, 8.0, 16.0, 2.0, 64, False, 1.0),
    Rope(10, 500.0, 4.0, 8.0, 0.5, 128, True, 1.0),
    Rope(64, 150000.0, 1.0, 32.0, 1.0, 4096, False, 1.0),
]


@pytest.mark.parametrize("rope", ROPES)
def test_yarn_table_against_turns(rope: Rope) -> None:
    """Protects the frequencies, with the paper's formulation by turns instead of ours by dimension index.

    A pair that makes r turns in the original context keeps 1 − γ of the slow and γ of the fast frequency. γ is linear
    in log r (without `truncate`), because a pair's index is linear in the logarithm of its turns.
    """
    got = rope.frequency_F().double()
    for i in range(rope.head_dim // 2):
        fast = rope.theta ** (-2 * i / rope.head_dim)
        turns = rope.original_max_position * fast / (2 * math.pi)
        high, low = rope.beta_fast, rope.beta_slow
        if rope.truncate:  # the turns of the whole dimensions outside: floor(index) has more turns, ceil fewer
            step = rope.theta ** (2 / rope.head_dim)
            at = [math.log(rope.original_max_position / (2 * math.pi * beta)) / math.log(step) for beta in (high, low)]
            high, low = (
                rope.original_max_position / (2 * math.pi) / step**n for n in (math.floor(at[0]), math.ceil(at[1]))
            )
        high = min(high, rope.original_max_position / (2 * math.pi))  # the ramp begins at dimension 0 at the earliest
        gamma = min(1.0, max(0.0, math.log(turns / low) / math.log(high / low)))
        expected = gamma * fast + (1 - gamma) * fast / rope.factor
        assert got[i].item() == pytest.approx(expected, rel=2e-6), i  # float32, a few roundings


def test_published_ramp() -> None:
    """Protects `truncate: false`: gpt-oss's ramp runs from dimension 8.09 to 17.40, not from 8 to 18."""
    rope = GptOssConfig.from_json(PUBLISHED).rope
    assert rope.ramp_ends() == pytest.approx((8.0928, 17.3980), abs=1e-4)
    assert ROPES[1].ramp_ends() == (8, 18)
    frequency = rope.frequency_F()
    assert frequency[0] == 1.0 and torch.equal(frequency[18:], ROPES[1].frequency_F()[18:])
    assert not torch.equal(frequency[9:17], ROPES[1].frequency_F()[9:17])


def test_plain_frequencies_are_a_llamas() -> None:
    """Bit for bit: no ramp rounds them."""
    for head_dim in (2, 10, 64, 128):
        index_F = torch.arange(head_dim // 2, dtype=torch.float32)
        for theta in (500.0, 10000.0, 5e5):
            assert torch.equal(Rope.plain(head_dim, theta).frequency_F(), 1 / theta ** (2 * index_F / head_dim))


def test_llama3_table_by_wavelengths() -> None:
    """Protects the frequencies, with the formulation of Llama 3.1 by wavelengths instead of ours by turns."""
    rope = Llama3Rope(128, 5e5, 8.0, 4.0, 1.0, 8192, False, 1.0)
    got, kinds = rope.frequency_F().double(), set()
    for i in range(64):
        fast = 5e5 ** (-i / 64)
        wavelength = 2 * math.pi / fast
        if wavelength < 8192 / 4:
            wanted, kind = fast, "fast"
        elif wavelength > 8192:
            wanted, kind = fast / 8, "slow"
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            wanted, kind = (1 - smooth) * fast / 8 + smooth * fast, "between"
        kinds.add(kind)
        assert got[i] == pytest.approx(wanted, rel=1e-5)
    assert len(kinds) == 3
