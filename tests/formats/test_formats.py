"""What every weight format promises (ExpertMatrix), for each entry of FORMATS."""

from collections.abc import Sequence
from math import prod

import pytest
import torch

from epmoe.formats import FORMATS, ExpertMatrix
from epmoe.formats.bf16 import Bf16Matrix
from epmoe.formats.mxfp4 import Mxfp4Matrix
from epmoe.tables import lookup

EXPERTS, ROWS, COLUMNS = 5, 6, 64

each_format = pytest.mark.parametrize("name", FORMATS)


# mypy looks at these.
FULFIL: dict[str, type[ExpertMatrix]] = {"mxfp4": Mxfp4Matrix, "bf16": Bf16Matrix}


def test_the_table_names_them() -> None:
    assert {name: format_class(name) for name in FORMATS} == FULFIL


def format_class(name: str) -> type[ExpertMatrix]:
    return lookup("quant", FORMATS, name)


def values(seed: int = 0) -> torch.Tensor:
    return torch.randn(EXPERTS, ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed))


def checkpoint(cls: type[ExpertMatrix]) -> dict[str, torch.Tensor]:
    """Tensors as a checkpoint would hold matrix `m`: right names, shapes and dtypes, random content."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, (shape, dtype) in cls.stored("m", (EXPERTS, ROWS, COLUMNS)).items():
        if dtype == torch.uint8:
            tensors[name] = torch.randint(110, 140, shape, generator=generator, dtype=dtype)
        else:
            tensors[name] = torch.randn(shape, generator=generator).to(dtype)
    return tensors


def read(cls: type[ExpertMatrix], experts: Sequence[int]) -> ExpertMatrix:
    tensors = checkpoint(cls)
    return cls.read("m", experts, lambda name, ids: tensors[name][list(ids)])


@each_format
def test_name_and_shape(name: str) -> None:
    matrix = format_class(name).quantize(values())
    assert matrix.format == name
    assert matrix.shape == (EXPERTS, ROWS, COLUMNS)
    assert matrix.device == torch.device("cpu")
    assert matrix.to(torch.device("cpu")).shape == matrix.shape


@each_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantised_dtype_and_shape(name: str, dtype: torch.dtype) -> None:
    value = format_class(name).quantize(values()).dequantize(dtype)
    assert value.dtype == dtype and value.shape == (EXPERTS, ROWS, COLUMNS)


@each_format
def test_quantising_again_changes_nothing(name: str) -> None:
    """Conversion is a projection: saving and loading a model any number of times keeps its weights."""
    cls = format_class(name)
    once = cls.quantize(values()).dequantize(torch.float32)
    assert torch.equal(cls.quantize(once).dequantize(torch.float32), once)


@each_format
def test_quantising_is_close(name: str) -> None:
    """Half a step of the coarsest format, E2M1: at most 1/4 of a value's magnitude, or of its group's for the small."""
    value = values()
    error = (format_class(name).quantize(value).dequantize(torch.float32) - value).abs()
    assert bool((error <= 0.25 * value.abs().amax(-1, keepdim=True)).all())


@each_format
def test_one_expert_at_a_time_equals_all_at_once(name: str) -> None:
    """Chunked conversion rests on it."""
    cls = format_class(name)
    whole = cls.quantize(values()).dequantize(torch.float32)
    parts = cls.cat([cls.quantize(part) for part in values().split(2)])
    assert torch.equal(parts.dequantize(torch.float32), whole)


@each_format
def test_select(name: str) -> None:
    matrix = format_class(name).quantize(values())
    some = matrix.select(slice(1, 3))
    assert some.shape == (2, ROWS, COLUMNS)
    assert torch.equal(some.dequantize(torch.float32), matrix.dequantize(torch.float32)[1:3])


@each_format
def test_stored_bytes_are_the_bytes_in_memory(name: str) -> None:
    """The loader plans memory and reads by `stored`."""
    cls = format_class(name)
    stored = cls.stored("m", (EXPERTS, ROWS, COLUMNS))
    assert sum(prod(shape) * dtype.itemsize for shape, dtype in stored.values()) == cls.quantize(values()).nbytes
    assert all(shape[0] == EXPERTS for shape, _ in stored.values()), "experts are sliced along the first dimension"


@each_format
@pytest.mark.parametrize("experts", [[0], [4], [1, 2, 3], [0, 4], [3, 1], list(range(EXPERTS))], ids=str)
def test_reading_some_experts(name: str, experts: list[int]) -> None:
    cls = format_class(name)
    everything = read(cls, range(EXPERTS))
    assert everything.shape == (EXPERTS, ROWS, COLUMNS)
    some = read(cls, experts).dequantize(torch.float32)
    assert torch.equal(some, everything.dequantize(torch.float32)[experts])


@pytest.mark.gpu
@each_format
def test_moving_to_the_gpu_keeps_the_values(name: str) -> None:
    cls = format_class(name)
    there = cls.quantize(values()).to(torch.device("cuda"))
    assert there.device.type == "cuda"
    here = cls.quantize(values().cuda()).dequantize(torch.float32)
    assert torch.equal(there.dequantize(torch.float32), here)
    assert torch.equal(here.cpu(), cls.quantize(values()).dequantize(torch.float32))
