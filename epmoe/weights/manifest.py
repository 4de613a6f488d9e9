"""What config.json promises of a checkpoint: every tensor's name, shape and dtype, the format of each layer's experts.

`Manifest.check` compares the promise with the headers, so that a contradiction is refused before any weight is read.

Letters: E experts · L experts on this rank · N output rows of a matrix · C its contraction columns.
"""

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Self

import torch

from epmoe.errors import UserError, warn
from epmoe.formats import FORMATS, ExpertMatrix
from epmoe.models import Family, Target
from epmoe.models.keys import Keys
from epmoe.tables import lookup
from epmoe.weights import layouts
from epmoe.weights.source import Source

MOST_PATTERNS = 1000  # of modules that are not converted; each is compared with every layer's experts
FLOATS = (torch.bfloat16, torch.float16, torch.float32)  # what biases and shared tensors may be stored in


@dataclass(frozen=True)
class Matrix:
    """One projection of all E experts of one layer, with its bias [E, N]."""

    name: str
    bias: str | None  # None: the family has none, and zeros take its place
    shape: tuple[int, int, int]  # (E, N, C)
    stored: type[ExpertMatrix]
    wanted: type[ExpertMatrix]

    def tensors(self) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
        """What the checkpoint must hold of it: each tensor's shape and the dtypes that it may have.

        Raises:
            UserError: sizes that the format cannot store.
        """
        found: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]] = {}
        for name, (shape, dtype) in self.stored.stored(self.name, self.shape).items():
            found[name] = (shape, FLOATS if dtype.is_floating_point else (dtype,))
        if self.bias is not None:
            found[self.bias] = (self.shape[:2], FLOATS)
        return found


@dataclass(frozen=True)
class Manifest:
    """The tensors that a model of this config.json consists of."""

    source: Source
    shared: Mapping[str, Target]  # name in the checkpoint → its target in the model: all but the experts
    shapes: Mapping[str, tuple[int, ...]]  # of the shared tensors, whole, by name in the checkpoint
    layers: tuple[tuple[Matrix, Matrix], ...]  # gate_up and down of each layer

    @classmethod
    def of(cls, source: Source, model: Family, quant: str) -> Self:
        """The promise for `model` (on meta), with `quant` a name of FORMATS or auto, the stored format.

        Raises:
            UserError: an unknown format in config.json or in `quant`.
        """
        config, shared = model.config, model.shared_tensors()
        shapes = _shapes(shared, dict(model.named_parameters()))
        layers = []
        for layer in range(config.layers):
            gate_up, gate_up_bias, down, down_bias = model.expert_names(layer)
            stored, wanted = _formats(source, gate_up.rpartition(".")[0], quant)
            shape = (config.num_experts, 2 * config.intermediate, config.hidden)
            first = Matrix(gate_up, gate_up_bias, shape, stored, wanted)
            shape = (config.num_experts, config.hidden, config.intermediate)
            layers.append((first, Matrix(down, down_bias, shape, stored, wanted)))
        return cls(source, shared, shapes, tuple(layers))

    def matrices(self) -> Iterator[Matrix]:
        for pair in self.layers:
            yield from pair

    def tensors(self) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
        """Every tensor that the checkpoint must hold: its shape and the dtypes that it may have.

        Raises:
            UserError: sizes that a format cannot store.
        """
        promised: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]
        promised = {name: (shape, FLOATS) for name, shape in self.shapes.items()}
        for matrix in self.matrices():
            promised |= matrix.tensors()
        return promised

    def check(self) -> None:
        """Compare with the checkpoint's headers.

        Raises:
            UserError: the first tensor that is missing, of a wrong shape or dtype, or not part of the model.
        """
        self._check_formats()
        promised, found = self.tensors(), self.source.tensors
        missing = [name for name in promised if name not in found]
        extra = [name for name in found if name not in promised]
        if missing and (one := layouts.one_by_one(extra)):
            raise UserError(
                f"{found[one].file} holds {one}, so experts one by one; gpt-oss's are published in one tensor a "
                "layer: convert it (transformers' save_pretrained), or take the published checkpoint"
            )
        if missing:
            raise UserError(
                f"checkpoint {self.source.path} lacks {_first(missing)}, which its config.json calls for: "
                f"complete the checkpoint or correct config.json"
            )
        if extra:
            raise UserError(
                f"{found[extra[0]].file} holds {_first(extra)}, which a model of its config.json does not have: "
                f"correct config.json or remove it"
            )
        for name, (shape, dtypes) in promised.items():
            info = found[name]
            if info.shape != shape:
                raise UserError(
                    f"{info.file}: {name} has shape {list(info.shape)}, but config.json"
                    f"{self._reason(info.shape, shape)} gives {list(shape)}: they do not belong together"
                )
            if info.dtype not in dtypes:
                raise UserError(
                    f"{info.file}: {name} has dtype {_short(info.dtype)}, expected "
                    f"{' or '.join(map(_short, dtypes))}: convert the checkpoint"
                )
        self._say_rounded()

    def bytes_to_read(self, local: int) -> int:
        """Bytes of tensors that a rank with `local` experts reads."""
        expert_bytes = 0
        for matrix in self.matrices():
            for name in matrix.tensors():
                expert_bytes += local * self.source.tensors[name].row_bytes
        return expert_bytes + sum(self.rows(name) * self.source.tensors[name].row_bytes for name in self.shared)

    def bytes_of_weights(self, local: int, dtype: torch.dtype) -> int:
        """Bytes of the weights of a rank with `local` experts, in the wanted formats, before a backend packs them.

        Raises:
            UserError: sizes that a wanted format cannot store.
        """
        values = sum(self.rows(name) * math.prod(shape[1:]) for name, shape in self.shapes.items())
        matrix_bytes = 0
        for matrix in self.matrices():
            values += local * matrix.shape[1]
            for shape, stored in matrix.wanted.stored(matrix.name, (local, *matrix.shape[1:])).values():
                matrix_bytes += math.prod(shape) * stored.itemsize
        return matrix_bytes + values * dtype.itemsize

    def rows(self, name: str) -> int:
        """Rows of a shared tensor that this rank has."""
        part = self.shared[name].stored
        return part.size if part else self.shapes[name][0]

    def _say_rounded(self) -> None:
        """Plain experts may be stored in any of FLOATS, and are bf16 in memory."""
        for matrix in self.matrices():
            info = self.source.tensors.get(matrix.name)  # MXFP4 has other names
            if info is not None and info.dtype != torch.bfloat16:
                warn(f"{info.file} stores experts in {_short(info.dtype)}: they are rounded to bfloat16 (quant=bf16)")
                return

    def _check_formats(self) -> None:
        """A config.json that names the wrong format is told so, not that dozens of tensors are missing."""
        found = self.source.tensors
        for matrix in self.matrices():
            if set(matrix.stored.stored(matrix.name, matrix.shape)) <= set(found):
                continue
            for other in FORMATS:
                names = list(lookup("quant", FORMATS, other).stored(matrix.name, (1, 32, 32)))
                if set(names) <= set(found):
                    raise UserError(
                        f"{found[names[0]].file} holds {names[0]}, so {other} experts, but the quantization_config of "
                        f"{self.source.path / 'config.json'} says {matrix.stored.format}: correct config.json"
                    )

    def _reason(self, found: tuple[int, ...], promised: tuple[int, ...]) -> str:
        """The keys of config.json that hold the numbers in which two shapes differ, for the message."""
        numbers = {b for a, b in zip(found, promised, strict=False) if a != b}
        keys = [f"{k}={v}" for k, v in self.source.config.items() if type(v) is int and v in numbers]
        return f" ({', '.join(keys)})" if keys else ""


def _shapes(shared: Mapping[str, Target], parameters: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of each stored tensor; their targets must cover every row of every parameter once."""
    filled = dict.fromkeys(parameters, 0)
    for target in shared.values():
        begin, end = target.rows or (0, len(parameters[target.parameter]))
        assert begin == filled[target.parameter] < end, f"{target} does not follow the target before it"
        filled[target.parameter] = end
    assert all(filled[name] == len(value) for name, value in parameters.items()), (
        "a parameter has rows that are no target"
    )
    own = {name: target.of(parameters[target.parameter]).shape for name, target in shared.items()}
    return {name: (part.of, *own[name][1:]) if (part := target.stored) else tuple(own[name])
            for name, target in shared.items()}  # fmt: skip


def _formats(source: Source, module: str, quant: str) -> tuple[type[ExpertMatrix], type[ExpertMatrix]]:
    """The formats in which the experts `module` are stored and wanted.

    quantization_config's modules_to_not_convert are left in bf16, by who wrote the checkpoint and by us.
    """
    file = source.path / "config.json"
    settings = source.config.get("quantization_config") or {}
    if not isinstance(settings, dict):
        raise UserError(f"{file}: quantization_config={settings!r} must be an object")
    keys = Keys(settings, str(file), "quantization_config.")
    skipped = keys.strings("modules_to_not_convert", [])
    if len(skipped) > MOST_PATTERNS:
        raise keys.error("modules_to_not_convert", f"has more than {MOST_PATTERNS} entries", shown=False)
    method = lookup(f"{file}: quantization_config.quant_method", FORMATS, keys.text("quant_method", "bf16"))
    keys.end()
    plain = lookup("quant", FORMATS, "bf16")
    wanted = method if quant == "auto" else lookup("quant", FORMATS, quant)
    return (plain, plain) if _matches(module, skipped) else (method, wanted)


def _matches(module: str, patterns: Collection[str]) -> bool:
    """Whether one of `patterns` names the module, one that contains it, or the end of its name; `*` is any text.

    The published list reads model.layers.*.self_attn, model.embed_tokens, lm_head.
    """
    parts = module.split(".")
    names = {".".join(parts[a:b]) for a in range(len(parts)) for b in range(a + 1, len(parts) + 1)}
    if not names.isdisjoint(patterns):
        return True
    globs = {
        re.sub(r"\*+", "*", each) for each in patterns if "*" in each and len(each.replace("*", "")) <= len(module)
    }
    return any(fnmatchcase(name, re.sub(r"[\[?]", r"[\g<0>]", glob)) for glob in globs for name in names)


def _first(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more tensors"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
