"""bf16 matrices: the checkpoint's transposed layout, and exactness. What all formats share is in test_formats.py."""

from collections.abc import Sequence

import torch

from epmoe.formats.bf16 import Bf16Matrix
from epmoe.formats.mxfp4 import Mxfp4Matrix


def test_checkpoint_layout() -> None:
    """Checkpoints hold [E, C, N]; forgetting the transpose goes unnoticed wherever N = C."""
    stored = Bf16Matrix.stored("experts.down_proj", (4, 6, 64))
    assert stored == {"experts.down_proj": ((4, 64, 6), torch.bfloat16)}
    checkpoint_ECN = torch.randn(4, 64, 6).bfloat16()
    matrix = Bf16Matrix.read("experts.down_proj", [1, 3], lambda name, ids: checkpoint_ECN[list(ids)])
    assert matrix.shape == (2, 6, 64) and matrix.value_LNC.is_contiguous()
    for local, expert in enumerate([1, 3]):
        assert torch.equal(matrix.value_LNC[local], checkpoint_ECN[expert].T)


def test_experts_are_read_one_at_a_time() -> None:
    """A rank's experts are transposed without a second copy of them all."""
    asked: list[list[int]] = []

    def read(name: str, ids: Sequence[int]) -> torch.Tensor:
        asked.append(list(ids))
        return torch.zeros(len(ids), 32, 3, dtype=torch.bfloat16)

    assert Bf16Matrix.read("m", range(2, 6), read).shape == (4, 3, 32)
    assert asked == [[2], [3], [4], [5]]


def test_rounding_is_to_nearest_even() -> None:
    value = torch.tensor([1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20]).view(1, 1, 4)
    matrix = Bf16Matrix.quantize(value)
    assert matrix.dequantize(torch.float32).flatten().tolist() == [1.0, 1.0, 1 + 2**-6, 1 + 2**-7]


def test_values_from_mxfp4_are_kept_in_a_float32_run() -> None:
    """`quant=bf16` on an MXFP4 checkpoint is another way to compute the same model."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 8, 2, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(0, 256, (3, 8, 2), generator=generator, dtype=torch.uint8).clamp(max=254)
    stored = Mxfp4Matrix(blocks, scales)
    converted = Bf16Matrix.quantize(stored.dequantize(torch.bfloat16))
    assert torch.equal(converted.dequantize(torch.float32), stored.dequantize(torch.float32))


def test_a_bfloat16_run_copies_nothing() -> None:
    matrix = Bf16Matrix.quantize(torch.zeros(2, 3, 4, dtype=torch.bfloat16))
    assert matrix.dequantize(torch.bfloat16).data_ptr() == matrix.value_LNC.data_ptr()
