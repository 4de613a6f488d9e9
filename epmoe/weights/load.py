"""Load: meta-device model ← this rank's slices → quant → pack → assign.

    resolve   what `auto` stands for: formats, backends, dtype (choices.py)
    check     every tensor's presence, shape and dtype against config.json, and whether the weights fit
    read      shared tensors whole, experts and shared heads by slice; each layer's experts are packed and installed

Only headers are read until every check has passed.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from epmoe.errors import UserError
from epmoe.layers.heads import HeadPart, Part, Share
from epmoe.models import MODELS, Family, ModelConfig, Target
from epmoe.moe.exchange import EXCHANGES, Exchange
from epmoe.ranks.memory import free_bytes, is_full
from epmoe.ranks.mesh import Ranks
from epmoe.streams import on_terminal
from epmoe.tables import lookup
from epmoe.weights import layouts
from epmoe.weights.choices import DTYPES, Choices, experts_of, placement_of, resolve, router_class, waiting
from epmoe.weights.experts import ExpertReader, Limits
from epmoe.weights.manifest import Manifest
from epmoe.weights.source import Source


@dataclass(frozen=True)
class LoadReport:
    """What was loaded, and what `auto` chose."""

    bytes_read: int  # of the safetensors files, by this rank, headers included
    seconds: float
    quant: str
    experts: str
    router: str
    combine: str
    placement: str
    attention: str
    dtype: str
    scale: str
    waits: tuple[str, ...]  # what of it waits for the device in a step, as "key=name": no graph can capture it


def load(
    source: Source,
    ranks: Ranks,
    choices: Choices | None = None,
    *,
    progress: bool = True,
    limits: Limits | None = None,
) -> tuple[Family, LoadReport]:
    """The model on `ranks.device` with this rank's experts, in evaluation mode, without gradients.

    Args:
        choices: None: auto for everything.
        progress: a bar on standard error, on rank 0 and on a terminal only.
        limits: tests take smaller ones.

    Raises:
        UserError: an unknown name, a checkpoint that contradicts its config.json, more ranks than experts, or weights
            that do not fit; but for the last, before any weight is read.
    """
    begin = time.perf_counter()
    asked = choices or Choices()
    family, config = model_of(source)
    with torch.device("meta"):
        model = family(config)
        if asked.attention == "tensor" and ranks.expert_size > 1:
            model.share_heads(share_of(config, ranks))
    manifest = Manifest.of(source, model, asked.quant)
    manifest.check()
    placement = placement_of(asked.placement, config.num_experts, ranks)
    chosen = resolve(asked, {matrix.wanted.format for matrix in manifest.matrices()}, ranks)
    # auto may choose otherwise where a package is lacking or nodes are counted otherwise; an exchange is a collective.
    ranks.agree(lambda: chosen.names, "name it, in the place of auto")

    ids, compute = placement.experts[ranks.expert_rank], DTYPES[chosen.dtype]
    backend, router = experts_of(chosen), router_class(chosen.router)()
    exchange: Exchange = lookup("combine", EXCHANGES, chosen.combine)(ranks, chosen.attention)
    here = placement.here(ranks.expert_rank, ranks.device)
    reader = ExpertReader(source, ids, ranks.device, limits, chosen.scale)
    shown = progress and ranks.is_main and on_terminal()
    with (
        fitting(manifest.bytes_of_weights(len(ids), compute), ranks.device),
        _bar(manifest.bytes_to_read(len(ids)), source, shown) as advance,
    ):
        for name, target in manifest.shared.items():
            assign(model, target, read(source, name, target.stored, ranks.device, compute))
            advance()
        for (gate_up, down), layer in zip(manifest.layers, model.moe_layers(), strict=True):
            packed = backend.pack(reader.weights(gate_up, down, compute), config.activation)
            layer.install(packed, router, exchange, here)
            advance()
        reader.check_finite()
        if ranks.device.type != "cpu":
            torch.accelerator.synchronize(ranks.device)
    source.close()
    tensors = [value for _, value in (*model.named_parameters(), *model.named_buffers())]
    assert not any(value.is_meta for value in tensors), "a tensor was not loaded"
    seconds = time.perf_counter() - begin
    report = LoadReport(source.bytes_read, seconds, waits=waiting(chosen), **chosen.names)
    return model.eval().requires_grad_(False), report


def share_of(config: ModelConfig, ranks: Ranks) -> Share:
    """This rank's heads, and what joins them with the other ranks'.

    Raises:
        UserError: as many ranks cannot share the model's heads.
    """
    part = HeadPart.of(config.heads, config.kv_heads, ranks.expert_rank, ranks.expert_size)
    columns = part.query.size * config.head_dim
    return Share(part, partial(ranks.beside, columns=[columns] * ranks.expert_size))


def read(source: Source, name: str, part: Part | None, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """A shared tensor in `dtype`, or some of its rows, of which alone bytes are read."""
    if part is None:
        return source.read(name, device, dtype)
    return source.read_rows(name, range(part.begin, part.end), device).to(dtype)


def assign(model: Family | nn.Module, target: Target, value: torch.Tensor) -> None:
    """Put `value` where it goes: a parameter that is on meta, or rows of one whose first rows may be there."""
    owner, _, leaf = target.parameter.rpartition(".")
    module = model.get_submodule(owner)
    parameter = getattr(module, leaf)
    assert target.of(parameter).shape == value.shape, target
    if target.rows is None:
        setattr(module, leaf, nn.Parameter(value, requires_grad=False))
        return
    if parameter.is_meta:
        whole = torch.empty(parameter.shape, dtype=value.dtype, device=value.device)
        parameter = nn.Parameter(whole, requires_grad=False)
        setattr(module, leaf, parameter)
    target.of(parameter).copy_(value)


def model_of(source: Source) -> tuple[type[Family], ModelConfig]:
    """The model class that config.json asks for, and its config.

    Raises:
        UserError: an unknown model_type, or a config.json that the model cannot be built from; it names the key.
    """
    file, name = source.path / "config.json", source.config.get("model_type")
    if name is None and layouts.is_original(source.tensors):
        raise UserError(f"{source.path} {layouts.ORIGINAL}")
    if not isinstance(name, str):
        raise UserError(f"{file} has no model_type; known: {', '.join(MODELS)}")
    family: type[Family] = lookup(f"{file}: model_type", MODELS, name)
    config: ModelConfig = family.Config.from_json(source.config)
    _check_sizes(config, source)
    return family, config


def _check_sizes(config: ModelConfig, source: Source) -> None:
    """Raises UserError for a size far beyond what is stored: before tables and modules of that size are made.

    A size that is merely another than the checkpoint's is told later, with the tensor that has it (manifest.py).
    """
    longest = max((size for info in source.tensors.values() for size in info.shape), default=0)
    sizes = {
        "number of layers": (config.layers, len(source.tensors)),
        "hidden size": (config.hidden, longest),
        "intermediate size": (config.intermediate, longest),
        "number of experts": (config.num_experts, longest),
        "number of key/value heads times head size": (config.kv_heads * config.head_dim, longest),
        "vocabulary": (config.vocab, longest),
    }
    for what, (size, most) in sizes.items():
        if size > 16 * most:
            raise UserError(
                f"{source.path / 'config.json'}: the {what} is {size}, which the checkpoint's {len(source.tensors)} "
                f"tensors, at most {longest} long, cannot have: they do not belong together"
            )


@contextmanager
def fitting(need: int, device: torch.device) -> Iterator[None]:
    """Refuse to begin when `need` bytes are not free, and say the same when memory runs out on the way."""
    free = free_bytes(device)
    message = (
        f"too little memory on {device}: this rank's weights need {need:,} bytes and some more to work with, "
        f"{free:,} are free; use more ranks, a smaller format (quant=mxfp4), or end what else runs there"
    )
    if need > free:
        raise UserError(message)
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_full(error):
            raise
        raise UserError(message) from error


@contextmanager
def _bar(total: int, source: Source, shown: bool) -> Iterator[Callable[[], None]]:
    """A progress bar over the bytes read; yields the function that moves it."""
    if not shown:
        yield lambda: None
        return
    from tqdm import tqdm

    before = source.bytes_read
    with tqdm(total=total, desc="load", unit="B", unit_scale=True, file=sys.stderr) as bar:
        yield lambda: bar.update(source.bytes_read - before - bar.n)
