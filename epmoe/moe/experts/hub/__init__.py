"""Experts in the community's Triton kernels, kernels-community/gpt-oss-triton-kernels: transformers runs the same ones.

    x ── gather, product, SwiGLU ── h ── product, gate weight, scatter ── y, a row for each slot
         first `matmul_ogs`              second `matmul_ogs`

Where the package adds a token's K rows itself, as transformers lets it, ranks could join sums alone. Here the second
product is told that a token has one expert (`n_expts_act=1`) and that there are T·K tokens: a row then goes to its
slot, and every exchange works. The package's words for a Dispatch, with -1 for what has no other half:

    expt_hist [L]             rows of each local expert               offset[l + 1] − offset[l]
    gather  src_indx [R]      row → slot, whose token is slot // K    slot_R
    scatter dst_indx [R]      row → slot                              slot_R
    scatter src_indx [S]      slot → row                              row_S
    gammas  [R]               row → gate weight                       weight_TK

Weights are brought into the layout that the package has for the device (on Hopper a swizzle of the values); scales stay
in rows, as transformers has them. All products are in bfloat16 with float32 sums; h is rounded to bfloat16. The swizzle
mixes 64 columns, and the kernel reads no further than the contraction is long, mixed or not: so contractions are filled
up with zeros to a multiple of 64 (gpt-oss's are ones, and then x is read as it is).

**Bits.** The package picks its tile by the rows of a call and cuts the contraction into parts where a call has few of
them, so a row's bits follow from the size of its batch. `hub.bitwise=true` (its `enforce_bitwise_invariance`) has one
tile and one part for every call: a row's bits follow from its token and its expert, on any number of ranks.

This file imports neither the package nor triton, so that any machine can ask what it serves.

Letters: T tokens · H hidden · I intermediate · K experts per token · L experts on this rank · N output rows, C
contraction columns of a matrix · S = T·K slots · R = S rows.
"""

from dataclasses import dataclass, fields
from importlib.util import find_spec
from typing import Any, ClassVar, Self

import torch
from torch.nn.functional import pad

from epmoe.config.schema import Hub
from epmoe.errors import UserError
from epmoe.formats import ExpertMatrix, ExpertWeights
from epmoe.formats.mxfp4 import Mxfp4Matrix
from epmoe.kernels import distinct
from epmoe.moe.experts import GatedActivation
from epmoe.moe.experts.hub.kernel import kernel_package
from epmoe.moe.experts.trial import tried
from epmoe.moe.router import Dispatch
from epmoe.trace import named

MIXED = 64  # columns of a contraction that a layout may mix


@dataclass(frozen=True)
class HubMatrix:
    """One projection [L, N, C] with its bias, as the package takes it."""

    shape: tuple[int, int, int]
    value: Any  # the package's tensor.Tensor of [L, C, N] codes, filled up
    precision: Any  # its PrecisionConfig, which holds the scales
    bias_LN: torch.Tensor  # float32

    @property
    def device(self) -> torch.device:
        return self.bias_LN.device

    @classmethod
    def pack(cls, package: Any, matrix: Mxfp4Matrix, bias_LN: torch.Tensor, bitwise: bool, row_step: int) -> Self:
        """Takes memory for the result and for a few copies of the codes. Rows become a multiple of `row_step`."""
        ogs, tensor, layouts = package.matmul_ogs, package.tensor, package.tensor_details.layout
        shape, blocks_LNG16, scales_LNG = matrix.shape, matrix.blocks_LNG16, matrix.scales_LNG
        more_rows, more_groups = -shape[1] % row_step, -shape[2] % MIXED // 32
        if more_rows or more_groups:
            blocks_LNG16 = pad(blocks_LNG16, (0, 0, 0, more_groups, 0, more_rows))
            scales_LNG = pad(scales_LNG, (0, more_groups, 0, more_rows))
            bias_LN = pad(bias_LN, (0, more_rows))
        local, rows, groups, _ = blocks_LNG16.shape
        layout, options = layouts.make_default_matmul_mxfp4_w_layout(mx_axis=1)
        value = tensor.wrap_torch_tensor(blocks_LNG16.flatten(2).transpose(1, 2), dtype=tensor.FP4)
        value = tensor.convert_layout(value, layout, **options)
        value.shape = torch.Size([local, groups * 32, rows])  # a swizzle has padded it
        scale = tensor.wrap_torch_tensor(scales_LNG.transpose(1, 2))
        scale = tensor.convert_layout(scale, layouts.StridedLayout)
        precision = ogs.PrecisionConfig(
            weight_scale=scale, flex_ctx=ogs.FlexCtx(rhs_data=ogs.InFlexData()), enforce_bitwise_invariance=bitwise
        )
        return cls(shape, value, precision, bias_LN.float().contiguous())

    def unpack(self) -> Mxfp4Matrix:
        """The inverse of `pack`, exact."""
        _, rows, columns = self.shape
        value_LCN, scale_LGN = (_plain(each) for each in (self.value, self.precision.weight_scale))
        blocks_LNG16 = value_LCN[:, : columns // 2, :rows].transpose(1, 2).unflatten(2, (-1, 16))
        scales_LNG = scale_LGN[:, : columns // 32, :rows].transpose(1, 2)
        return Mxfp4Matrix(blocks_LNG16.contiguous(), scales_LNG.contiguous())

    @property
    def nbytes(self) -> int:
        parts = (self.value.storage.data, self.precision.weight_scale.storage.data, self.bias_LN)
        return sum(part.nbytes for part in parts)


class HubExperts:
    """MXFP4 experts on any accelerator that the community's kernels run on; in bfloat16. Never waits for the device."""

    formats: ClassVar[frozenset[str]] = frozenset({"mxfp4"})
    dtypes: ClassVar[frozenset[torch.dtype]] = frozenset({torch.bfloat16})
    waits: ClassVar[bool] = False
    settings: ClassVar[Hub] = Hub()

    def __init__(
        self, package: Any, gate_up: HubMatrix, down: HubMatrix, dtype: torch.dtype, activation: GatedActivation
    ) -> None:
        self.package, self.gate_up, self.down, self.dtype = package, gate_up, down, dtype
        ogs = package.matmul_ogs
        specs = ogs.FnSpecs("swiglu", package.swiglu.swiglu_fn, ("alpha", "limit"))
        self.fused = ogs.FusedActivation(specs, (activation.alpha, activation.limit), 2)
        # A later version's words, without which tiles follow the rows of this rank, T·K / L, and not T·K / E.
        known = {field.name for field in fields(package.routing.RoutingData)}
        self._expects = "expected_tokens_per_expt" in known

    @classmethod
    def configured(cls, settings: Hub) -> type[Self]:
        """This backend with the kernels that the configuration names, which are imported now.

        Raises:
            UserError: see `kernel_package`.
        """
        kernel_package(settings.kernel)
        made: type[Self] = type(cls.__name__, (cls,), {"settings": settings})
        return made

    @classmethod
    def serves(cls, device: torch.device) -> bool:
        """Where there is the package that loads them; the first product tells whether they run on this very one."""
        return device.type != "cpu" and _installed()

    @classmethod
    def distinct(cls, tokens: int) -> tuple[int, ...]:
        """Tiles change by powers of two of a call's rows. Where a call has few, others may compile anew, too."""
        return tuple(sorted(distinct(tokens)))

    @classmethod
    def pack(cls, weights: ExpertWeights, activation: GatedActivation) -> Self:
        """Into the package's layout; then one token goes through, so that what cannot run is told before a prompt is.

        Raises:
            UserError: another format than mxfp4, another dtype than bfloat16, another activation, kernels that cannot
                be loaded or do not run on this device.
        """
        gate_up, down = (cls._stored(each) for each in (weights.gate_up, weights.down))
        dtype = weights.gate_up_bias_LN.dtype
        if dtype not in cls.dtypes:
            raise UserError(
                f"experts=hub computes in bfloat16, and this model in {str(dtype).removeprefix('torch.')}: "
                "set runtime.dtype=bfloat16, or choose other experts="
            )
        if activation.up_offset != 1.0:
            raise UserError(
                f"experts=hub has gpt-oss's activation, gate · (up + 1), and this model's adds {activation.up_offset:g}"
                ": choose experts=triton or experts=reference"
            )
        package, bitwise = kernel_package(cls.settings.kernel), cls.settings.bitwise
        made = cls(
            package,
            HubMatrix.pack(package, gate_up, weights.gate_up_bias_LN, bitwise, 2 * MIXED),  # h's columns
            HubMatrix.pack(package, down, weights.down_bias_LH, bitwise, 1),
            dtype,
            activation,
        )
        tried(made, made.gate_up, dtype, f"experts=hub: hub.kernel={cls.settings.kernel}")
        return made

    @classmethod
    def _stored(cls, matrix: ExpertMatrix) -> Mxfp4Matrix:
        if not isinstance(matrix, Mxfp4Matrix):
            raise UserError(
                f"experts=hub runs quant={'|'.join(sorted(cls.formats))}, not quant={matrix.format}: choose that, or "
                "experts=reference"
            )
        return matrix

    def unpack(self) -> ExpertWeights:
        matrices = (self.gate_up, self.down)
        (gate_up, down), (first_LN, second_LH) = zip(
            *((matrix.unpack(), matrix.bias_LN[:, : matrix.shape[1]].to(self.dtype)) for matrix in matrices),
            strict=True,
        )
        return ExpertWeights(gate_up, first_LN, down, second_LH)

    @property
    def nbytes(self) -> int:
        return self.gate_up.nbytes + self.down.nbytes

    def forward(self, x_TH: torch.Tensor, dispatch: Dispatch, y_TKH: torch.Tensor | None = None) -> torch.Tensor:
        """[T, H] → this rank's slot rows [T, K, H], all in bfloat16, others zero."""
        (tokens, hidden), top_k = x_TH.shape, dispatch.expert_TK.shape[1]
        if y_TKH is None:
            y_TKH = x_TH.new_zeros(tokens, top_k, hidden)
        if not tokens:
            return y_TKH
        routing, matmul = self.package.routing, self.package.matmul_ogs.matmul_ogs
        if hidden % MIXED:
            x_TH = pad(x_TH, (0, -hidden % MIXED))
        slots, count_L = tokens * top_k, dispatch.offset_L1.diff()
        slot_R = torch.where(dispatch.slot_R < slots, dispatch.slot_R, -1)
        weight_R = dispatch.weight_TK.flatten()[slot_R.clamp(min=0).long()]
        rows = routing.compute_expt_data(count_L, len(count_L), slots)
        more = {"expected_tokens_per_expt": max(1, slots // dispatch.num_experts)} if self._expects else {}
        with named("gate_up"):
            h_RI = matmul(
                x_TH,
                self.gate_up.value,
                self.gate_up.bias_LN,
                routing.RoutingData(weight_R, count_L, len(count_L), top_k, rows, **more),
                gather_indx=routing.GatherIndx(src_indx=slot_R, dst_indx=dispatch.row_S),
                precision_config=self.gate_up.precision,
                fused_activation=self.fused,
            )
        with named("down"):
            matmul(
                h_RI,
                self.down.value,
                self.down.bias_LN,
                routing.RoutingData(weight_R, count_L, len(count_L), 1, rows, **more),
                scatter_indx=routing.ScatterIndx(src_indx=dispatch.row_S, dst_indx=slot_R),
                precision_config=self.down.precision,
                gammas=weight_R,
                y=y_TKH.view(1, slots, hidden),
            )
        return y_TKH


def _installed() -> bool:
    try:
        return find_spec("kernels") is not None
    except ValueError:  # its entry in sys.modules says that there is none
        return False


def _plain(tensor: Any) -> torch.Tensor:
    """The bytes of one of the package's tensors, out of its layout."""
    data: torch.Tensor = tensor.storage.layout.unswizzle_data(tensor.storage.data)
    return data
