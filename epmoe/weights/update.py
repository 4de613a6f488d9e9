"""Update: other weights into a loaded model, in the memory that it reads, so that captured graphs stay valid.

    check   names, shapes, dtypes, whether all are finite     nothing has been changed before every check has passed
    write   shared tensors whole, experts by this rank's slice, a layer at a time

Tensors have the checkpoint's names and layout, be it that of any format: plain experts are quantised where the model's
are MXFP4, as `load` does it.

Letters: E experts · L experts on this rank.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Self

import torch

from epmoe.errors import UserError
from epmoe.formats import FORMATS, ExpertMatrix, ExpertWeights
from epmoe.models import Family
from epmoe.moe.experts import Experts
from epmoe.moe.layer import MoE
from epmoe.ranks.mesh import Ranks
from epmoe.tables import lookup
from epmoe.weights import layouts
from epmoe.weights.choices import DTYPES, placement_of
from epmoe.weights.experts import ExpertReader
from epmoe.weights.load import LoadReport
from epmoe.weights.manifest import FLOATS, Manifest, Matrix
from epmoe.weights.source import TensorInfo

NamedTensors = Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class Given:
    """Tensors by name, as a Source of them."""

    values: Mapping[str, torch.Tensor]
    path: Path = Path("update_weights")
    config: Mapping[str, Any] = field(default_factory=dict)
    bytes_read: int = 0

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {name: TensorInfo(self.path, tuple(value.shape), value.dtype, 0) for name, value in self.values.items()}

    def read(self, name: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> torch.Tensor:
        return self.values[name].detach().to(device, dtype, copy=True)

    def rows(self, name: str, ids: Sequence[int]) -> torch.Tensor:
        """A copy of them, where they are: the caller's tensors may change later."""
        value = self.values[name].detach()
        return value[torch.tensor(ids, dtype=torch.int64, device=value.device)]

    def read_rows(self, name: str, ids: Sequence[int], device: torch.device | str = "cpu") -> torch.Tensor:
        return self.rows(name, ids).to(device)

    def close(self) -> None:
        """Nothing was taken."""


@dataclass(frozen=True)
class Update:
    """Tensors that belong to a model, checked; `forms` says in which format a matrix is given, by its name."""

    manifest: Manifest
    given: Given
    forms: Mapping[str, type[ExpertMatrix]]

    @classmethod
    def of(cls, manifest: Manifest, tensors: NamedTensors) -> Self:
        """Check names, shapes and dtypes. All tensors are held until the update has ended.

        Raises:
            UserError: a name that the model does not have or that comes twice, another shape or dtype, a matrix in two
                formats or with half of its tensors.
        """
        values = _collected(tensors)
        promised: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]
        promised = {name: (shape, FLOATS) for name, shape in manifest.shapes.items()}
        forms: dict[str, type[ExpertMatrix]] = {}
        for matrix in manifest.matrices():
            promised |= {matrix.bias: (matrix.shape[:2], FLOATS)} if matrix.bias is not None else {}
            for form in _forms(matrix):
                names = replace(matrix, stored=form, bias=None).tensors()
                promised |= names
                if names.keys().isdisjoint(values):
                    continue
                if missing := names.keys() - values.keys():
                    raise UserError(
                        f"update_weights: {min(missing)} is missing: give all of {', '.join(names)} at once"
                    )
                if matrix.name in forms:
                    raise UserError(f"update_weights: {matrix.name} comes in two formats: give one of them")
                forms[matrix.name] = form
        for name, value in values.items():
            _check(name, value, promised)
        return cls(manifest, Given(values), forms)

    @property
    def table(self) -> list[Any]:
        """What is given, without its values: the same on every rank."""
        return [[name, list(value.shape), str(value.dtype)] for name, value in self.given.values.items()]

    def apply(self, model: Family, report: LoadReport, ranks: Ranks) -> bool:
        """Check that all is finite, and change the weights of the model, loaded as `report` says. A collective.

        Returns:
            whether all weights stayed in their memory, on every rank: else graphs that read it must be captured anew.
        Raises:
            UserError: see `check_finite`; nothing has changed then.
        """
        placement = placement_of(report.placement, model.config.num_experts, ranks)
        ids, dtype = placement.experts[ranks.expert_rank], DTYPES[report.dtype]
        self.check_finite(ids, dtype, ranks)
        stayed = self.write(model, ids, report, ranks.device)
        return all(each for (each,) in ranks.gather([stayed]))

    def check_finite(self, ids: Sequence[int], dtype: torch.dtype, ranks: Ranks) -> None:
        """Raises UserError, on every rank, for a value that is not finite in memory, in the experts `ids` on this rank.

        A collective.
        """
        found = [each for each in ranks.gather(next(self._not_finite(ids, dtype), (-1, -1))) if each[0] >= 0]
        if found:
            number, expert = min(found)
            name = list(self.given.values)[number]
            whose = f" of expert {expert}" if expert >= 0 else ""
            raise UserError(f"update_weights: {name}{whose} holds NaN or an infinity: nothing was changed")

    def _not_finite(self, ids: Sequence[int], dtype: torch.dtype) -> Iterator[tuple[int, int]]:
        """(number of the tensor, expert or -1) of each, one expert at a time."""
        numbers = {name: number for number, name in enumerate(self.given.values)}
        for name in self.manifest.shapes.keys() & numbers.keys():
            if not _finite(self.given.values[name], dtype):
                yield numbers[name], -1
        for matrix in self.manifest.matrices():
            for expert in ids:
                if matrix.bias in numbers and not _finite(self.given.rows(matrix.bias, [expert]), dtype):
                    yield numbers[matrix.bias], expert
                form = self.forms.get(matrix.name)
                if form is not None and not form.read(matrix.name, [expert], self.given.rows).finite_L().all():
                    yield numbers[min(form.stored(matrix.name, matrix.shape))], expert

    @torch.no_grad()
    def write(self, model: Family, ids: Sequence[int], report: LoadReport, device: torch.device) -> bool:
        """Change the weights of the model, loaded as `report` says; whether all of them stayed in their memory.

        Raises:
            torch.OutOfMemoryError: a layer more of experts does not fit; some weights are the new ones then.
        """
        parameters = dict(model.named_parameters())
        for name, target in self.manifest.shared.items():
            if name in self.given.values:
                target.of(parameters[target.parameter]).copy_(target.part(self.given.values[name]))
        dtype, stayed = DTYPES[report.dtype], True
        reader = ExpertReader(self.given, ids, device, scale=report.scale)
        for pair, layer in zip(self.manifest.layers, model.moe_layers(), strict=True):
            names = {name for matrix in pair for name in (matrix.name, matrix.bias)}
            if not names.isdisjoint({*self.forms, *self.given.values}):
                assert layer.experts is not None
                weights = self._weights(pair, reader, layer.experts, dtype)
                stayed &= _install(layer, type(layer.experts).pack(weights, model.config.activation))
        return stayed

    def _weights(
        self, pair: tuple[Matrix, Matrix], reader: ExpertReader, now: Experts, dtype: torch.dtype
    ) -> ExpertWeights:
        """One layer's, those that are not given as they are now."""
        found: dict[str, Any] = {}
        for matrix, name, bias in zip(pair, ("gate_up", "down"), ("gate_up_bias_LN", "down_bias_LH"), strict=True):
            if form := self.forms.get(matrix.name):
                found[name] = reader.matrix(replace(matrix, stored=form))
            if matrix.bias in self.given.values:
                found[bias] = reader.bias(matrix, dtype)
        return ExpertWeights(**found) if len(found) == len(fields(ExpertWeights)) else replace(now.unpack(), **found)


def broadcast(table: Sequence[Any], values: Mapping[str, torch.Tensor] | None, ranks: Ranks) -> dict[str, torch.Tensor]:
    """Rank 0's tensors (`values`) on every rank; others hold them on the host. A collective.

    Args:
        table: `Update.table` of them.
    """
    found = {}
    for name, shape, dtype in table:
        tensor = torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")), device=ranks.device)
        if values is not None:
            tensor.copy_(values[name].detach())
        ranks.spread(tensor.view(-1).view(torch.uint8))
        found[name] = tensor.cpu() if values is None else values[name]
    return found


def _collected(tensors: NamedTensors) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for each in tensors.items() if isinstance(tensors, Mapping) else tensors:
        match each:
            case (str(name), torch.Tensor() as value):
                if name in found:
                    raise UserError(f"update_weights: {name} comes twice: give it once")
                found[name] = value
            case _:
                raise UserError(f"update_weights: an item ({type(each).__name__}) is no pair of a name and a tensor")
    if not found:
        raise UserError("update_weights: no tensors: give some of the checkpoint's, by their names")
    return found


def _forms(matrix: Matrix) -> Iterator[type[ExpertMatrix]]:
    """The formats that can hold the matrix."""
    for name in FORMATS:
        form: type[ExpertMatrix] = lookup("quant", FORMATS, name)
        try:
            form.stored(matrix.name, matrix.shape)
        except UserError:  # sizes that it cannot store
            continue
        yield form


def _check(
    name: str, value: torch.Tensor, promised: Mapping[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]
) -> None:
    if name not in promised:
        if layouts.one_by_one([name]):
            raise UserError(f"update_weights: {name} is of one expert: give the experts of a layer in one tensor")
        close = get_close_matches(name, promised, n=1)
        raise UserError(
            f"update_weights: the model has no {name}: give the checkpoint's names"
            + (f" (did you mean {close[0]}?)" if close else "")
        )
    shape, dtypes = promised[name]
    if tuple(value.shape) != shape:
        raise UserError(f"update_weights: {name} has shape {list(value.shape)}, and the model's has {list(shape)}")
    if value.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise UserError(f"update_weights: {name} is {str(value.dtype).removeprefix('torch.')}: give {wanted}")


def _install(layer: MoE, fresh: Experts) -> bool:
    """Let the layer have the fresh experts' weights: in the old ones' memory, if they differ in tensors' values alone.

    What else a backend keeps of its weights (which kernel serves them) may be in captured graphs: then the layer gets
    the fresh ones, and False says so.
    """
    old, new = list(_parts(vars(layer.experts))), list(_parts(vars(fresh)))
    alike = [_kind(each) for each in old] == [_kind(each) for each in new]
    if not alike or not any(isinstance(each, torch.Tensor) for each in old):
        layer.experts = fresh
        return False
    for here, there in zip(old, new, strict=True):
        if isinstance(here, torch.Tensor):
            here.copy_(there)
    return True


def _parts(value: Any) -> Iterator[Any]:
    """The tensors that an object holds, and whatever else, in order."""
    if isinstance(value, tuple | list):
        for each in value:
            yield from _parts(each)
    elif isinstance(value, dict):
        for name in sorted(value):
            yield from _parts(value[name])
    elif is_dataclass(value):
        yield from _parts({item.name: getattr(value, item.name) for item in fields(value)})
    else:
        yield value


def _finite(value: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether all of it is, in the dtype in which it will be kept."""
    return bool(value.to(dtype).isfinite().all())


def _kind(value: Any) -> Any:
    """What must be the same of two parts so that one can take the other's values."""
    return (value.shape, value.dtype, value.device) if isinstance(value, torch.Tensor) else value
