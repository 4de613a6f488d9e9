"""Stands in for kernels-community/gpt-oss-triton-kernels: the same names and index conventions, in torch, on a CPU.

`written(folder)` makes of this file a repository as the package `kernels` loads it, which imports it by itself: so
nothing of the tests is imported here. What it does is what the real one's callers may see:

    matmul_ogs      row r of an expert comes from x[gather.src_indx[r] // n_expts_act], or is row r of x; then bias,
                    activation and gamma[r]; with a scatter and one expert a token it goes to row scatter.dst_indx[r]
                    of y, and rows whose scatter.src_indx is -1 become zero; with more, a token's rows are added
    layouts         codes are padded and shuffled, so that only the layout's own inverse gives them back; of columns
                    behind the last multiple of 64, a product leaves some out
    bits            the contraction is cut into as many parts as a call has few rows, unless
                    enforce_bitwise_invariance; each part's rows have one size, so no other bits follow from a batch

Memory that is not given is filled with NaN: a row that was not written shows.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn.functional import pad

NAME = "kernels-community/gpt-oss-triton-kernels"
MODULE = "gpt_oss_triton_kernels"
TILE = 16  # rows of a product, whose bits its library picks by their number


def written(folder: Path, device: str = "cpu") -> Path:
    """A repository of this kernel in `folder`; returns that."""
    build = folder / "build" / f"torch-{device}"
    (build / MODULE).mkdir(parents=True)
    about = {"id": f"_{MODULE}_{folder.name.replace('-', '_')}", "name": NAME.partition("/")[2], "version": 1}
    about |= {"license": "Apache-2.0", "python-depends": [], "backend": {"type": device}}
    (build / "metadata.json").write_text(json.dumps(about))
    shutil.copy(__file__, build / MODULE / "__init__.py")
    return folder


# --- tensor, tensor_details.layout ------------------------------------------------------------------------------------

FP4 = SimpleNamespace(bitwidth=4)


class StridedLayout:
    name: str | None = None

    def __init__(self, shape) -> None:
        self.initial_shape = shape

    def swizzle_data(self, data):
        return data

    def unswizzle_data(self, data):
        return data


class ShuffledLayout(StridedLayout):
    """Pads rows to a multiple of 64 and turns their order around, and, as Hopper's, mixes the bytes of 64 columns;
    `mx_axis` has stride 1."""

    name = "SHUFFLED"

    def __init__(self, shape, mx_axis) -> None:
        assert mx_axis == 1
        super().__init__(shape)

    def swizzle_data(self, data):
        rows = pad(data.mT, (0, -data.shape[1] % 32, 0, -data.shape[2] % 64))
        return rows.flip(1).unflatten(2, (-1, 32)).flip(3).flatten(2).contiguous().mT ^ 0xA5

    def unswizzle_data(self, data):
        rows = (data ^ 0xA5).mT.flip(1).unflatten(2, (-1, 32)).flip(3).flatten(2)
        return rows.mT[:, : self.initial_shape[1], : self.initial_shape[2]]


@dataclass
class Storage:
    data: torch.Tensor
    layout: StridedLayout


@dataclass
class Tensor:
    storage: Storage
    dtype: object
    shape: list

    def stride(self, i):
        return self.storage.data.stride(i)


def wrap_torch_tensor(data, dtype=None):
    shape = list(data.shape)
    shape[data.stride().index(1)] *= 2 if dtype is FP4 else 1
    return Tensor(Storage(data, StridedLayout(data.shape)), dtype or data.dtype, shape)


def convert_layout(tensor, layout, **options):
    data = tensor.storage.layout.unswizzle_data(tensor.storage.data)
    made = layout(data.shape, **options)
    return Tensor(Storage(made.swizzle_data(data), made), tensor.dtype, tensor.shape)


# --- routing ----------------------------------------------------------------------------------------------------------


@dataclass
class Indx:
    src_indx: torch.Tensor
    dst_indx: torch.Tensor

    def __post_init__(self):
        assert self.src_indx.dtype == self.dst_indx.dtype == torch.int32


@dataclass
class ExptData:
    hist: torch.Tensor
    token_offs_raw: torch.Tensor
    rows: int


@dataclass
class RoutingData:
    gate_scal: torch.Tensor
    expt_hist: torch.Tensor
    n_expts_tot: int
    n_expts_act: int
    expt_data: ExptData
    expected_tokens_per_expt: int | None = None


def compute_expt_data(hist, n_expts_tot, n_gates):
    assert hist.dtype == torch.int32 and hist.shape == (n_expts_tot,)
    offsets = pad(hist.cumsum(0), (1, 0)).int()
    assert offsets[-1] <= n_gates
    return ExptData(hist, offsets, n_gates)


# --- swiglu -----------------------------------------------------------------------------------------------------------


def swiglu_fn(x, alpha, limit):
    gate, up = x[:, 0::2].clamp(max=limit), x[:, 1::2].clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


# --- matmul_ogs -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FnSpecs:
    name: str
    fn: object
    fn_arg_names: tuple


@dataclass(frozen=True)
class FusedActivation:
    specs: FnSpecs
    fn_args: tuple
    reduction_n: int


@dataclass(frozen=True)
class InFlexData:
    scale: torch.Tensor | None = None


@dataclass(frozen=True)
class FlexCtx:
    rhs_data: InFlexData


@dataclass
class PrecisionConfig:
    weight_scale: Tensor
    flex_ctx: FlexCtx
    enforce_bitwise_invariance: bool = False


def product(
    x,
    w,
    bias,
    routing_data,
    gather_indx=None,
    scatter_indx=None,
    precision_config=None,
    gammas=None,
    y=None,
    fused_activation=None,
):
    assert x.dtype == torch.bfloat16 and bias.dtype == torch.float32, "bf16 rows, float32 biases"
    assert w.stride(-2) == 1, "`w` must be column-major"
    columns, rows = w.shape[-2:]
    assert columns == x.shape[-1] and x.shape[0] > 0
    data, top_k = routing_data.expt_data, routing_data.n_expts_act
    count = x.shape[0] if gather_indx is None else gather_indx.src_indx.shape[0]
    assert data.rows == count and routing_data.n_expts_tot == w.shape[0] == len(data.hist)
    value = decoded(w, precision_config.weight_scale)
    of_expert = routing_data.expected_tokens_per_expt or max(1, count // routing_data.n_expts_tot)
    parts = 1 if precision_config.enforce_bitwise_invariance else max(1, min(4, 8 // of_expert))
    out = torch.full((count, rows // (fused_activation.reduction_n if fused_activation else 1)), torch.nan)
    for expert in range(routing_data.n_expts_tot):
        start = int(data.token_offs_raw[expert])
        index = torch.arange(start, start + int(data.hist[expert]))
        source = index if gather_indx is None else gather_indx.src_indx[index].long() // top_k
        assert (source >= 0).all() and (source < len(x)).all()
        product = product_of(x[source].float(), value[expert], parts) + bias[expert]
        if fused_activation is not None:
            product = fused_activation.specs.fn(product, *fused_activation.fn_args)
        out[index] = product if gammas is None else product * gammas[index, None]
    return scattered(out, scatter_indx, top_k, x.dtype, y)


def scattered(out, scatter_indx, top_k, dtype, y):
    """Rows where they belong, as a matrix."""
    if scatter_indx is None:
        assert y is None
        return out.to(dtype)
    used = scatter_indx.dst_indx >= 0
    if top_k > 1:
        token = scatter_indx.dst_indx[used].long() // top_k
        return torch.zeros(len(out) // top_k, out.shape[1]).index_add_(0, token, out[used]).to(dtype)
    if y is None:
        y = torch.full((1, *out.shape), torch.nan, dtype=dtype)
    assert y.shape == (1, *out.shape) and y.dtype == dtype
    y[0, scatter_indx.src_indx < 0] = 0
    y[0, scatter_indx.dst_indx[used].long()] = out[used].to(dtype)
    return y[0]


def product_of(x, w, parts):
    """x [M, C] · w [C, N], TILE rows at a time, the contraction in so many parts, each rounded to bf16 if it is one.

    (Of float32 parts the sum, rounded to bf16, would be that of the whole on most machines, bit for bit.)
    """
    tiles = []
    for tile in x.split(TILE):
        pieces = zip(pad(tile, (0, 0, 0, TILE - len(tile))).chunk(parts, 1), w.chunk(parts, 0), strict=True)
        sums = [a.contiguous() @ b.contiguous() for a, b in pieces]
        whole = sums[0] if parts == 1 else sum(each.bfloat16().float() for each in sums)
        tiles.append(whole[: len(tile)])
    return torch.cat(tiles) if tiles else x.new_zeros(0, w.shape[1])


def decoded(w, scale):
    """[L, C, N] in float32; the low nibble comes first, 32 values share a scale byte.

    As the real one, it reads no more bytes of a layout than the contraction has, whatever the layout has put there.
    """
    data = w.storage.data.clone()
    data[:, w.shape[1] // 2 :] = 0xA5  # zeros
    code = w.storage.layout.unswizzle_data(data)
    magnitude = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    table = torch.cat([magnitude, -magnitude])
    pair = torch.stack([table[(code & 15).long()], table[(code >> 4).long()]], dim=2).flatten(1, 2)
    byte = scale.storage.layout.unswizzle_data(scale.storage.data)
    exponent = torch.exp2(byte.float() - 127).masked_fill(byte == 255, torch.nan)
    return pair * exponent.repeat_interleave(32, dim=1)


matmul_ogs = SimpleNamespace(
    matmul_ogs=product,
    FnSpecs=FnSpecs,
    FusedActivation=FusedActivation,
    PrecisionConfig=PrecisionConfig,
    FlexCtx=FlexCtx,
    InFlexData=InFlexData,
)
routing = SimpleNamespace(
    RoutingData=RoutingData, GatherIndx=Indx, ScatterIndx=Indx, compute_expt_data=compute_expt_data
)
swiglu = SimpleNamespace(swiglu_fn=swiglu_fn)
tensor = SimpleNamespace(wrap_torch_tensor=wrap_torch_tensor, convert_layout=convert_layout, FP4=FP4)
tensor_details = SimpleNamespace(
    layout=SimpleNamespace(
        StridedLayout=StridedLayout,
        make_default_matmul_mxfp4_w_layout=lambda mx_axis: (ShuffledLayout, {"mx_axis": mx_axis}),
    )
)
