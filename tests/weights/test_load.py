"""Load: every rank holds what the checkpoint says, in the wanted format, on any device."""

import io
import threading
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import torch
from loading import EXPERTS, load_rank, rewrite_config, rewrite_tensors, same, share_of, stored, weights_of
from safetensors.torch import save_file
from spawn import run_ranks

from epmoe.errors import UserError
from epmoe.formats.bf16 import Bf16Matrix
from epmoe.formats.mxfp4 import Mxfp4Matrix
from epmoe.models import MODELS, Target
from epmoe.models.gpt_oss import GptOss
from epmoe.moe.experts.reference import ReferenceExperts
from epmoe.moe.placement import contiguous
from epmoe.ranks.mesh import Ranks
from epmoe.weights import manifest
from epmoe.weights.checkpoint import SINGLE, Checkpoint
from epmoe.weights.choices import Choices
from epmoe.weights.experts import ExpertReader, Limits
from epmoe.weights.load import load
from epmoe.weights.synthetic import make_checkpoint


@pytest.mark.parametrize("dtype_experts", ["mxfp4", "bf16"])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_every_rank_holds_the_shared_tensors_and_its_experts(size: int, dtype_experts: str, tmp_path: Path) -> None:
    """The weights themselves, in the checkpoint's format, for even and uneven shares, from several files."""
    make_checkpoint(tmp_path, dtype_experts=dtype_experts, shards=2, norm_std=0.1)
    tensors, shares = stored(tmp_path), contiguous(5, size).experts
    for rank in range(size):
        model, report = load_rank(tmp_path, rank, size)
        assert (report.quant, report.experts, report.dtype) == (dtype_experts, "reference", "float32")
        parameters = dict(model.named_parameters())
        for name, target in model.shared_tensors().items():
            parameter = parameters[target.parameter]
            assert torch.equal(target.of(parameter), tensors[name].float()) and not parameter.requires_grad
        for layer, weights in enumerate(weights_of(model)):
            mine = {k: tensors[EXPERTS.format(layer) + k][list(shares[rank])] for k in EXPERT_TENSORS[dtype_experts]}
            assert torch.equal(weights.gate_up_bias_LN, mine["gate_up_proj_bias"].float())
            assert torch.equal(weights.down_bias_LH, mine["down_proj_bias"].float())
            for matrix, name in ((weights.gate_up, "gate_up_proj"), (weights.down, "down_proj")):
                if dtype_experts == "mxfp4":
                    assert isinstance(matrix, Mxfp4Matrix)
                    assert torch.equal(matrix.blocks_LNG16, mine[name + "_blocks"])
                    assert torch.equal(matrix.scales_LNG, mine[name + "_scales"])
                else:
                    assert isinstance(matrix, Bf16Matrix) and torch.equal(matrix.value_LNC, mine[name].mT)
        assert not model.training


EXPERT_TENSORS = {
    "mxfp4": tuple(f"{m}_proj_{part}" for m in ("gate_up", "down") for part in ("blocks", "scales", "bias")),
    "bf16": ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"),
}


@pytest.mark.parametrize("size", [2, 3, 6, 12])
def test_every_rank_holds_its_heads(size: int, tmp_path: Path) -> None:
    """mesh.attention=tensor: with whole groups, and with some queries of a head."""
    make_checkpoint(tmp_path, heads=12, kv_heads=3 if size == 3 else 6, head_dim=10, experts=12)
    tensors, found = stored(tmp_path), dict[str, list[torch.Tensor]]()
    for rank in range(size):
        model = load_rank(tmp_path, rank, size, attention="tensor")[0]
        parameters = dict(model.named_parameters())
        for name, target in model.shared_tensors().items():
            own = target.of(parameters[target.parameter])
            assert torch.equal(own, target.part(tensors[name]).float())
            if target.stored:
                found.setdefault(name, []).append(own)
        held = sum(value.numel() for value in parameters.values())
        assert model.own_kv_heads == max(1, model.config.kv_heads // size) and held < whole_of(tmp_path)
    kinds = {name.split("self_attn.")[1] for name in found}
    assert kinds == {"sinks", *(f"{part}_proj.{kind}" for part in "qkv" for kind in ("weight", "bias"))}
    for name, parts in found.items():
        again = max(1, size // 6) if "k_proj" in name or "v_proj" in name else 1
        assert torch.equal(torch.cat(parts[::again]), tensors[name].float())


def whole_of(path: Path) -> int:
    return sum(value.numel() for value in load_rank(path)[0].parameters())


def test_tied_embeddings_and_no_attention_bias(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, tied=True, attention_bias=False)
    model, _ = load_rank(tmp_path)
    assert "lm_head.weight" not in stored(tmp_path)
    assert not any("unembedding" in name or name.endswith("attention.qkv.bias") for name, _ in model.named_parameters())


class WithoutExpertBiases(GptOss):
    """Another family: its experts are two matrices, and nothing is added to their products."""

    @staticmethod
    def expert_names(layer: int) -> tuple[str, None, str, None]:
        gate_up, _, down, _ = GptOss.expert_names(layer)
        return gate_up, None, down, None


def test_a_family_without_expert_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds zeros for them, reads none, and refuses a checkpoint that has some."""
    path = make_checkpoint(tmp_path)

    def zero(tensors: dict[str, torch.Tensor]) -> None:
        for name in biases(tensors):
            tensors[name].zero_()

    def remove(tensors: dict[str, torch.Tensor]) -> None:
        for name in biases(tensors):
            del tensors[name]

    def biases(tensors: dict[str, torch.Tensor]) -> list[str]:
        return [name for name in tensors if ".experts." in name and name.endswith("_bias")]

    rewrite_tensors(path, zero)
    with_zeros, _ = load_rank(path, 1, 3)
    monkeypatch.setitem(MODELS, "gpt_oss", f"{__name__}:WithoutExpertBiases")
    with pytest.raises(UserError, match=r"a model of its config\.json does not have"):
        load_rank(path, 1, 3)
    rewrite_tensors(path, remove)
    without, report = load_rank(path, 1, 3)
    assert all(same(a, b) for a, b in zip(weights_of(without), weights_of(with_zeros), strict=True))
    assert sum(weights.gate_up_bias_LN.count_nonzero() for weights in weights_of(without)) == 0
    assert report.bytes_read == share_of(path, len(contiguous(5, 3).experts[1]), 5)


def test_auto_says_what_it_chose(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_checkpoint(tmp_path)
    load_rank(tmp_path)
    assert (
        "auto chose quant=mxfp4, experts=reference, router=reference, combine=slots, dtype=float32"
        in capsys.readouterr().err
    )
    load_rank(tmp_path, rank=1, size=2)
    assert capsys.readouterr().err == ""
    everything: dict[str, Any] = {
        "quant": "bf16",
        "experts": "reference",
        "router": "reference",
        "combine": "all_reduce",
        "dtype": "bfloat16",
    }
    model, report = load_rank(tmp_path, **everything)
    assert capsys.readouterr().err == "" and {key: getattr(report, key) for key in everything} == everything
    assert model.norm.weight.dtype == torch.bfloat16


class Outside(ReferenceExperts):
    """A backend that no table names."""


def test_experts_from_outside_the_repository(tmp_path: Path) -> None:
    """`experts=package.module:Class` packs the layers; the report says so, and that steps with it wait."""
    make_checkpoint(tmp_path)
    name = f"{__name__}:Outside"
    model, report = load_rank(tmp_path, experts=name)
    assert {type(layer.experts).__name__ for layer in model.moe_layers()} == {"Outside"}
    assert report.experts == name and report.waits == (f"experts={name}", "router=reference")


def test_the_bar_is_for_terminals_and_counts_this_ranks_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint(tmp_path)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    load_rank(tmp_path, 0, 2)
    assert "100%" in capsys.readouterr().err
    load_rank(tmp_path, 0, 2, progress=False)
    load_rank(tmp_path, 1, 2)
    assert "%" not in capsys.readouterr().err


GAPS = [[(0, 2)], [(0, 2), (3, 4)], [(0, 2), (1, 4)], [(2, 4), (0, 2)], [(0, 4), None], [(0, 5)]]


@pytest.mark.parametrize("rows", GAPS, ids=str)
def test_targets_cover_a_parameter_once(rows: list[tuple[int, int] | None]) -> None:
    """Protects a matrix that several tensors make up: no row is left on meta and none is written twice."""
    parameters = {"w": torch.empty(4, 3, device="meta")}
    assert manifest._shapes({"a": Target("w", (0, 1)), "b": Target("w", (1, 4))}, parameters) == {
        "a": (1, 3),
        "b": (3, 3),
    }
    with pytest.raises(AssertionError, match="target"):
        manifest._shapes({str(i): Target("w", each) for i, each in enumerate(rows)}, parameters)


# --- formats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype_experts", "quant", "scale"),
    [("bf16", "mxfp4", "ocp"), ("bf16", "mxfp4", "up"), ("bf16", "mxfp4", "best"), ("mxfp4", "bf16", "ocp")],
)
def test_converting_slices_by_chunks_is_converting_the_whole(
    dtype_experts: str, quant: str, scale: str, tmp_path: Path
) -> None:
    make_checkpoint(tmp_path, dtype_experts=dtype_experts, experts=7)
    tensors = stored(tmp_path)
    limits = Limits(chunk_bytes=2 * 128 * 96 * 2)  # two experts of gate_up at a time, four of down
    for size in (1, 2, 3):
        for rank, ids in enumerate(contiguous(7, size).experts):
            model, report = load_rank(tmp_path, rank, size, quant=quant, scale=scale, limits=limits)
            assert (report.quant, report.scale) == (quant, scale)
            for layer, weights in enumerate(weights_of(model)):
                for matrix, name in ((weights.gate_up, "gate_up_proj"), (weights.down, "down_proj")):
                    name = EXPERTS.format(layer) + name
                    if quant == "mxfp4":
                        whole = Mxfp4Matrix.quantize(tensors[name].mT.contiguous(), scale)
                        assert isinstance(matrix, Mxfp4Matrix)
                        assert torch.equal(matrix.blocks_LNG16, whole.blocks_LNG16[list(ids)])
                        assert torch.equal(matrix.scales_LNG, whole.scales_LNG[list(ids)])
                    else:
                        value = Mxfp4Matrix(tensors[name + "_blocks"], tensors[name + "_scales"]).dequantize(
                            torch.bfloat16
                        )
                        assert isinstance(matrix, Bf16Matrix) and torch.equal(matrix.value_LNC, value[list(ids)])


@pytest.mark.parametrize(
    ("pattern", "hit"),
    [
        ("model.layers.3.mlp.experts", True),
        ("model.layers.3.mlp", True),
        ("model.layers.3", True),
        ("model.layers.*.mlp.experts", True),
        ("model.layers.*", True),
        ("mlp.experts", True),
        ("experts", True),
        ("*.mlp.*", True),
        ("model.layers.13", False),
        ("model.layers.1", False),
        ("model.layers.*.self_attn", False),
        ("model.layers.*.mlp.router", False),
        ("perts", False),
        ("model.layers.3.ml", False),
        ("lm_head", False),
        ("model-layers", False),
        ("*exp*", True),
        ("*.*rts", True),
        ("*ml", False),
        ("model.layers.?.mlp", False),
        ("model.layers.[0-9].mlp", False),
        ("*" * 30 + "x", False),
        ("*e" * 13 + "x", False),  # a regular expression would try them all, for minutes
    ],
)
def test_patterns_of_modules_to_not_convert(pattern: str, hit: bool) -> None:
    assert manifest._matches("model.layers.3.mlp.experts", ["lm_head", pattern]) is hit


def test_modules_to_not_convert_stay_bf16_when_quantising(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, dtype_experts="bf16", layers=3)
    rewrite_config(tmp_path, quantization_config={"modules_to_not_convert": ["model.layers.1.mlp", "lm_head"]})
    model, report = load_rank(tmp_path, quant="mxfp4")
    assert [weights.gate_up.format for weights in weights_of(model)] == ["mxfp4", "bf16", "mxfp4"]
    assert [weights.down.format for weights in weights_of(model)] == ["mxfp4", "bf16", "mxfp4"]
    assert report.quant == "mxfp4"


@pytest.mark.parametrize(
    ("quant", "formats"), [("auto", ["mxfp4", "bf16"]), ("mxfp4", ["mxfp4", "bf16"]), ("bf16", ["bf16"] * 2)]
)
def test_a_checkpoint_of_two_formats(quant: str, formats: list[str], tmp_path: Path) -> None:
    """Layer 1 was left unconverted by whoever wrote the checkpoint."""
    mixed, plain = make_checkpoint(tmp_path / "mixed"), make_checkpoint(tmp_path / "plain", dtype_experts="bf16")
    second = EXPERTS.format(1)
    kept = {name: value for name, value in stored(mixed).items() if not name.startswith(second)}
    save_file(kept | {k: v for k, v in stored(plain).items() if k.startswith(second)}, mixed / SINGLE)
    config = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.1.mlp.experts"]}
    rewrite_config(mixed, quantization_config=config)
    model, _ = load_rank(mixed, quant=quant)
    assert [weights.gate_up.format for weights in weights_of(model)] == formats


def test_a_full_device_converts_on_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Told once, and the same weights come out."""
    make_checkpoint(tmp_path, dtype_experts="bf16")
    expected = weights_of(load_rank(tmp_path, quant="mxfp4")[0])
    capsys.readouterr()
    tries = []

    def full(self: ExpertReader, matrix: manifest.Matrix, device: torch.device) -> Any:
        tries.append(matrix.name)
        if len(tries) == 2:
            raise torch.OutOfMemoryError("full")
        return real(self, matrix, device)

    real = ExpertReader._convert
    monkeypatch.setattr(ExpertReader, "_convert", full)
    checkpoint = Checkpoint.open(tmp_path)
    reader = ExpertReader(checkpoint, range(5), torch.device("cpu"))
    reader.on_host = False  # as if the device were another
    for layer, weights in enumerate(expected):
        shapes = {"gate_up_proj": (5, 128, 96), "down_proj": (5, 96, 64)}
        pair = [
            manifest.Matrix(
                EXPERTS.format(layer) + name, EXPERTS.format(layer) + name + "_bias", shape, Bf16Matrix, Mxfp4Matrix
            )
            for name, shape in shapes.items()
        ]
        assert same(reader.weights(pair[0], pair[1], torch.float32), weights)
    said = capsys.readouterr().err
    assert said.count("converted on the host") == 1 and EXPERTS.format(0) + "down_proj" in said
    assert len(tries) == 5  # the second twice


# --- devices ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("quant", ["mxfp4", "bf16"])
@pytest.mark.parametrize("dtype_experts", ["mxfp4", "bf16"])
@pytest.mark.parametrize("rank", [0, 1])
def test_cuda_loads_what_the_cpu_loads(rank: int, dtype_experts: str, quant: str, tmp_path: Path) -> None:
    """Bit for bit, each format from each."""
    make_checkpoint(tmp_path, dtype_experts=dtype_experts, layers=3, experts=9, hidden=192, intermediate=96)
    options = {"quant": quant, "dtype": "bfloat16", "experts": "reference", "router": "reference"}
    cpu, _ = load_rank(tmp_path, rank, 2, **options)
    cuda, report = load_rank(tmp_path, rank, 2, device="cuda:0", **options)
    assert report.bytes_read == share_of(tmp_path, (5, 4)[rank], 9)
    for name, value in cuda.named_parameters():
        assert value.is_cuda and torch.equal(value.cpu(), cpu.get_parameter(name))
    assert all(same(a, b) for a, b in zip(weights_of(cuda), weights_of(cpu), strict=True))


@pytest.mark.gpu
def test_auto_on_cuda_packs_the_same_weights_for_triton(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    cpu, _ = load_rank(tmp_path, dtype="bfloat16")
    cuda, report = load_rank(tmp_path, device="cuda:0")
    assert (report.experts, report.router, report.dtype) == ("triton", "triton", "bfloat16")
    assert all(same(a, b) for a, b in zip(weights_of(cuda), weights_of(cpu), strict=True))


def load_within(mine: Ranks, more: int, path: Path, **options: Any) -> tuple[Any, str]:
    """The model and what loading said, by a process that may take `more` bytes of device memory.

    A fresh process, started for it: what earlier tests leave in an allocator (blocks that are free although their
    segment is held, cycles whose tensors go in the middle of a test) would give a load more than that.
    """
    for thread in [each for each in threading.enumerate() if each.name == "epmoe-wake"]:
        thread.join()  # the library of products takes memory of its own
    there, total = torch.cuda.memory_reserved(mine.device), torch.cuda.get_device_properties(mine.device).total_memory
    assert there < 40 << 20
    torch.cuda.set_per_process_memory_fraction((there + more) / total, mine.device)
    with redirect_stderr(io.StringIO()) as said:
        model, _ = load(Checkpoint.open(path), mine, Choices(experts="reference", **options))
    return model, said.getvalue()


def convert_with_70_mb(mine: Ranks, path: Path) -> tuple[str, bool]:
    """What loading said, and whether the weights are those that a CPU loads."""
    model, said = load_within(mine, 70 << 20, path, quant="mxfp4")
    expected, _ = load_rank(path, quant="mxfp4", dtype="bfloat16")
    return said, all(same(a, b) for a, b in zip(weights_of(model), weights_of(expected), strict=True))


@pytest.mark.gpu
def test_a_really_full_device_converts_on_the_host(tmp_path: Path) -> None:
    """Encoding takes up to 100 MB beside the result, the weights take 40: with 70 MB only the host can convert."""
    make_checkpoint(tmp_path, dtype_experts="bf16", experts=8, hidden=1024, intermediate=1024)
    [(said, equal)] = run_ranks(convert_with_70_mb, 1, tmp_path, device="cuda")
    assert said.count("converted on the host") == 1 and equal


def load_with_10_mb(mine: Ranks, path: Path) -> None:
    load_within(mine, 10 << 20, path)


@pytest.mark.gpu
def test_weights_that_do_not_fit_the_device(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, experts=8, hidden=1024, intermediate=1024)
    with pytest.raises(UserError, match=r"too little memory on cuda:0: this rank's weights need [\d,]+ bytes"):
        run_ranks(load_with_10_mb, 1, tmp_path, device="cuda")
