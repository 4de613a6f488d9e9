"""Load: meta-device model ← this rank's slices → quant → pack → assign.

    choose    what `auto` stands for: formats, backends, dtype
    check     every tensor's presence, shape and dtype against config.json, and whether the weights fit
    read      shared tensors whole, experts by slice; each layer's experts are packed and installed

Only headers are read until every check has passed.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from epmoe.errors import UserError
from epmoe.models import MODELS, Place
from epmoe.moe.exchange import EXCHANGES
from epmoe.moe.experts import EXPERTS
from epmoe.moe.placement import PLACEMENTS
from epmoe.moe.router import ROUTERS
from epmoe.ranks.memory import free_bytes
from epmoe.ranks.mesh import Ranks
from epmoe.tables import lookup
from epmoe.weights.checkpoint import Checkpoint
from epmoe.weights.experts import ExpertReader
from epmoe.weights.manifest import Manifest

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class LoadReport:
    """What was loaded, and what `auto` chose."""

    bytes_read: int  # of the safetensors files, by this rank, headers included
    seconds: float
    quant: str
    experts: str
    router: str
    combine: str
    dtype: str
    waits: tuple[str, ...] = ()  # what of it waits for the device in a step, as "key=name": no graph can capture it


def load(
    checkpoint: Checkpoint,
    ranks: Ranks,
    *,
    quant: str = "auto",
    experts: str = "auto",
    router: str = "auto",
    combine: str = "auto",
    placement: str = "contiguous",
    dtype: str = "auto",
    progress: bool = True,
) -> tuple[Any, LoadReport]:
    """The model on `ranks.device` with this rank's experts, in evaluation mode, without gradients.

    Args:
        quant: a name of FORMATS, or auto: the format that the checkpoint stores.
        experts, router: names of EXPERTS and ROUTERS, or auto: triton on an accelerator, else reference.
        combine: a name of EXCHANGES, or auto: slots on one node, all_reduce on several.
        placement: a name of PLACEMENTS.
        dtype: bfloat16, float32, or auto: bfloat16 on an accelerator, else float32. Of all but the experts' matrices.
        progress: a bar on standard error, on rank 0 and on a terminal only.

    Raises:
        UserError: an unknown name, a checkpoint that contradicts its config.json, more ranks than experts, or weights
            that do not fit; but for the last, before any weight is read.
    """
    begin = time.perf_counter()
    device = ranks.device
    model_class, config = model_of(checkpoint)
    with torch.device("meta"):
        model = model_class(config)
    manifest = Manifest.of(checkpoint, model, config, quant)
    manifest.check()
    owners = lookup("placement", PLACEMENTS, placement)(config.num_experts, ranks.expert_size)
    ids = owners.experts[ranks.expert_rank]
    chosen = _choose(
        manifest, ranks, {"quant": quant, "experts": experts, "router": router, "combine": combine, "dtype": dtype}
    )
    backend, route = lookup("experts", EXPERTS, chosen["experts"]), lookup("router", ROUTERS, chosen["router"])
    exchange, compute = lookup("combine", EXCHANGES, chosen["combine"])(ranks), DTYPES[chosen["dtype"]]

    local_E = owners.local_E(ranks.expert_rank, device)
    reader = ExpertReader(checkpoint, ids, device)
    shown = progress and ranks.is_main and sys.stderr.isatty()
    with (
        _fitting(manifest.bytes_of_weights(len(ids), compute), device),
        _bar(manifest.bytes_to_read(len(ids)), checkpoint, shown) as advance,
    ):
        for name, place in manifest.shared.items():
            _assign(model, place, checkpoint.read(name, device, compute))
            advance()
        for (gate_up, down), layer in zip(manifest.layers, model.moe_layers(), strict=True):
            packed = backend.pack(reader.weights(gate_up, down, compute), config.activation)
            layer.install(packed, route, exchange, local_E, len(ids))
            advance()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
    checkpoint.reader.close()
    assert not any(value.is_meta for value in (*model.parameters(), *model.buffers())), "a tensor was not loaded"
    # The torch references look at values.
    waits = tuple(f"{key}={chosen[key]}" for key in ("experts", "router") if chosen[key] == "reference")
    seconds = time.perf_counter() - begin
    report = LoadReport(bytes_read=checkpoint.bytes_read, seconds=seconds, waits=waits, **chosen)
    return model.eval().requires_grad_(False), report


def _assign(model: nn.Module, place: Place, value: torch.Tensor) -> None:
    """Put `value` in its place: of a parameter that is on meta, or of rows of one whose first rows may be there."""
    owner, _, leaf = place.parameter.rpartition(".")
    module = model.get_submodule(owner)
    parameter = getattr(module, leaf)
    assert place.of(parameter).shape == value.shape, place
    if place.rows is None:
        setattr(module, leaf, nn.Parameter(value, requires_grad=False))
        return
    if parameter.is_meta:
        whole = torch.empty(parameter.shape, dtype=value.dtype, device=value.device)
        parameter = nn.Parameter(whole, requires_grad=False)
        setattr(module, leaf, parameter)
    place.of(parameter).copy_(value)


def model_of(checkpoint: Checkpoint) -> tuple[Any, Any]:
    """The model class that config.json asks for, and its config.

    Raises:
        UserError: an unknown model_type, or a config.json that the model cannot be built from; it names the key.
    """
    place, name = checkpoint.path / "config.json", checkpoint.config.get("model_type")
    if not isinstance(name, str):
        raise UserError(f"{place} has no model_type; known: {', '.join(MODELS)}")
    model_class = lookup(f"{place}: model_type", MODELS, name)
    return model_class, model_class.Config.from_json(checkpoint.config)


def _choose(manifest: Manifest, ranks: Ranks, asked: dict[str, str]) -> dict[str, str]:
    """`asked` with a name in the place of every auto; says on standard error what auto chose.

    Raises:
        UserError: an unknown name, or a backend that does not run the wanted formats.
    """
    accelerated = ranks.device.type != "cpu"
    formats = {matrix.wanted.format for matrix in manifest.matrices()}
    fast = accelerated and asked["experts"] == "auto" and formats <= lookup("experts", EXPERTS, "triton").formats
    auto = {
        # A layer that modules_to_not_convert leaves in bf16 does not make it a bf16 model.
        "quant": next((name for name in sorted(formats) if name != "bf16"), "bf16"),
        "experts": "triton" if fast else "reference",
        "router": "triton" if accelerated else "reference",
        "combine": "slots" if ranks.nodes == 1 else "all_reduce",
        "dtype": "bfloat16" if accelerated else "float32",
    }
    chosen = {key: auto[key] if name == "auto" else name for key, name in asked.items()}
    if chosen["dtype"] not in DTYPES:
        raise UserError(f"dtype={chosen['dtype']!r} is unknown; known: {', '.join(DTYPES)}")
    for key, table in (("router", ROUTERS), ("combine", EXCHANGES)):
        lookup(key, table, chosen[key])
    runs = lookup("experts", EXPERTS, chosen["experts"]).formats
    if not formats <= runs:
        raise UserError(
            f"experts={chosen['experts']} does not run {', '.join(sorted(formats - runs))}, only "
            f"{', '.join(sorted(runs))}: choose another backend or another quant"
        )
    said = [f"{key}={name}" for key, name in chosen.items() if asked[key] == "auto"]
    if said and ranks.is_main:
        print(f"epmoe: auto chose {', '.join(said)}", file=sys.stderr)
    return chosen


@contextmanager
def _fitting(need: int, device: torch.device) -> Iterator[None]:
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
    except torch.OutOfMemoryError as error:
        raise UserError(message) from error


@contextmanager
def _bar(total: int, checkpoint: Checkpoint, shown: bool) -> Iterator[Callable[[], None]]:
    """A progress bar over the bytes read; yields the function that moves it."""
    if not shown:
        yield lambda: None
        return
    from tqdm import tqdm

    before = checkpoint.bytes_read
    with tqdm(total=total, desc="load", unit="B", unit_scale=True, file=sys.stderr) as bar:
        yield lambda: bar.update(checkpoint.bytes_read - before - bar.n)
