"""Load: every rank reads its share and no more, holds what the checkpoint says, and refuses a checkpoint that lies.

Letters: L experts on a rank.
"""

import ctypes
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from spawn import run_ranks

from epmoe import convert, manifest
from epmoe.checkpoint import INDEX, SINGLE, Checkpoint
from epmoe.convert import ExpertReader
from epmoe.errors import UserError
from epmoe.load import LoadReport, load
from epmoe.placement import contiguous
from epmoe.quant import ExpertWeights
from epmoe.quant.bf16 import Bf16Matrix
from epmoe.quant.mxfp4 import Mxfp4Matrix
from epmoe.ranks import Ranks
from epmoe.synthetic import make_checkpoint

EXPERTS = "model.layers.{}.mlp.experts."


def rank_of(rank: int, size: int, device: str = "cpu") -> Ranks:
    """A rank without its peers: loading needs no collective."""
    return Ranks(
        rank=rank, size=size, local_rank=rank, nodes=1, device=torch.device(device),
        expert_rank=rank, expert_size=size, expert_group=None,
    )  # fmt: skip


def load_rank(path: Path, rank: int = 0, size: int = 1, device: str = "cpu", **options: Any) -> tuple[Any, LoadReport]:
    return load(Checkpoint.open(path), rank_of(rank, size, device), **options)


def weights_of(model: Any) -> list[ExpertWeights]:
    return [layer.experts.unpack() for layer in model.moe_layers()]


def stored(path: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in path.glob("*.safetensors") for name, value in load_file(file).items()}


def rewrite_config(path: Path, **changes: Any) -> None:
    """Change config.json; a key that becomes None is removed."""
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def rewrite_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path / SINGLE)
    change(tensors)
    save_file(tensors, path / SINGLE)


# --- what is loaded ---------------------------------------------------------------------------------------------------


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
        for name, parameter in model.shared_tensors(model.config).items():
            assert torch.equal(parameters[parameter], tensors[name].float()) and not parameters[parameter].requires_grad
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


def test_tied_embeddings_and_no_attention_bias(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, tied=True, attention_bias=False)
    model, _ = load_rank(tmp_path)
    assert "lm_head.weight" not in stored(tmp_path)
    assert not any("unembedding" in name or name.endswith("attention.q.bias") for name, _ in model.named_parameters())


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


# --- bytes and memory, seen from outside the loader -------------------------------------------------------------------


def read_so_far() -> int:
    """Bytes that this process has asked the system for, by the system's count."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


def bytes_of_loads(ranks: Ranks, warm: Path, loads: Sequence[tuple[Path, str]]) -> list[tuple[int, int]]:
    """(bytes by the system's count, bytes by the report) of each (checkpoint, quant)."""
    for path, quant in ((warm, "mxfp4"), (warm, "bf16")):  # imports are read from files, too
        load(Checkpoint.open(path), ranks, quant=quant)
    result = []
    for path, quant in loads:
        before = read_so_far()
        _, report = load(Checkpoint.open(path), ranks, quant=quant)
        result.append((read_so_far() - before, report.bytes_read))
    return result


def share_of(path: Path, local: int, experts: int) -> int:
    """What a rank with `local` experts has to read, from the files themselves."""
    expert_bytes = sum(value.nbytes for name, value in stored(path).items() if ".experts." in name)
    everything = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    return everything - expert_bytes + expert_bytes // experts * local


# JSON files, /proc itself, /sys: far less than one expert of one layer (0.8 MB in MXFP4).
IO_SLACK = 100_000


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of 7 experts, each larger than what else a process reads, in both formats; `warm` is a tiny one."""
    path, sizes = tmp_path_factory.mktemp("large"), {"experts": 7, "hidden": 512, "intermediate": 1024, "layers": 1}
    return {
        "warm": make_checkpoint(path / "warm", layers=1),
        "mxfp4": make_checkpoint(path / "mxfp4", "tiny", **sizes, shards=2),
        "bf16": make_checkpoint(path / "bf16", "tiny", **sizes, dtype_experts="bf16"),
    }


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_rank_reads_its_share_by_the_systems_count(size: int, large: dict[str, Path]) -> None:
    """Its experts, the shared tensors and the headers: on real ranks, without and with conversion, by /proc/self/io."""
    loads = [(large[stored], quant) for stored in ("mxfp4", "bf16") for quant in ("mxfp4", "bf16")]
    results = run_ranks(bytes_of_loads, size, large["warm"], loads)
    for rank, local in enumerate(map(len, contiguous(7, size).experts)):
        for (path, _), (by_system, by_report) in zip(loads, results[rank], strict=True):
            assert by_report == share_of(path, local, 7)
            assert by_report <= by_system <= by_report + IO_SLACK


def memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) * 1024


def peak_of_load(ranks: Ranks, warm: Path, path: Path, quant: str) -> tuple[int, int]:
    """(growth of the resident memory's peak during a load, bytes of the loaded weights), with small chunks."""
    ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD: what is freed leaves the resident memory at once
    convert.CHUNK_BYTES = 4 << 20
    for name, value in (("epmoe.quant.mxfp4.CHUNK_VALUES", 1 << 18), ("epmoe.checkpoint._CAST_BYTES", 4 << 20)):
        module, _, attribute = name.rpartition(".")
        setattr(__import__(module, fromlist=[attribute]), attribute, value)
    load(Checkpoint.open(warm), ranks, quant=quant)  # what libraries allocate once
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
    before = memory("VmRSS")
    model, _ = load(Checkpoint.open(path), ranks, quant=quant)
    growth = memory("VmHWM") - before
    weights = sum(value.nbytes for value in model.parameters()) + sum(
        layer.experts.nbytes for layer in model.moe_layers()
    )
    return growth, weights


@pytest.mark.parametrize(
    ("dtype_experts", "quant"), [("mxfp4", "mxfp4"), ("bf16", "mxfp4"), ("bf16", "bf16"), ("mxfp4", "bf16")]
)
def test_host_memory_in_flight_is_bounded(
    dtype_experts: str, quant: str, large: dict[str, Path], tmp_path: Path
) -> None:
    """Beside the weights: chunks; and where chunks were converted, the last matrix again while they are joined.

    Without chunks, bf16 → MXFP4 takes 52 MiB more; a whole gate_up read before it is transposed or cast, 64 MiB.
    """
    path = make_checkpoint(
        tmp_path, layers=2, experts=16, hidden=1024, intermediate=1024, vocab=20000, dtype_experts=dtype_experts
    )
    values = 16 * 1024 * 1024
    joined = 0 if dtype_experts == quant else 2 * values if quant == "bf16" else values * 17 // 32
    [(growth, weights)] = run_ranks(peak_of_load, 1, large["warm"], path, quant)
    assert growth <= weights + joined + (20 << 20)


# --- formats ----------------------------------------------------------------------------------------------------------


def same(a: ExpertWeights, b: ExpertWeights) -> bool:
    pairs = [(a.gate_up_bias_LN, b.gate_up_bias_LN), (a.down_bias_LH, b.down_bias_LH)]
    for x, y in ((a.gate_up, b.gate_up), (a.down, b.down)):
        assert x.format == y.format
        pairs += [(getattr(x, field.name), getattr(y, field.name)) for field in fields(x)]  # type: ignore[arg-type]
    return all(torch.equal(x.cpu(), y.cpu()) for x, y in pairs)


@pytest.mark.parametrize(("dtype_experts", "quant"), [("bf16", "mxfp4"), ("mxfp4", "bf16")])
def test_converting_slices_by_chunks_is_converting_the_whole(
    dtype_experts: str, quant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint(tmp_path, dtype_experts=dtype_experts, experts=7)
    tensors = stored(tmp_path)
    monkeypatch.setattr(convert, "CHUNK_BYTES", 2 * 128 * 96 * 2)  # two experts of gate_up at a time, four of down
    for size in (1, 2, 3):
        for rank, ids in enumerate(contiguous(7, size).experts):
            model, report = load_rank(tmp_path, rank, size, quant=quant)
            assert report.quant == quant
            for layer, weights in enumerate(weights_of(model)):
                for matrix, name in ((weights.gate_up, "gate_up_proj"), (weights.down, "down_proj")):
                    name = EXPERTS.format(layer) + name
                    if quant == "mxfp4":
                        whole = Mxfp4Matrix.quantize(tensors[name].mT.contiguous())
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
    ],
)
def test_patterns_of_modules_to_not_convert(pattern: str, hit: bool) -> None:
    assert manifest._matches("model.layers.3.mlp.experts", pattern) is hit


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


# --- refusals ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    name: str
    spoil: Callable[[Path], object]
    says: str  # a regular expression of the message


def config(**changes: Any) -> Callable[[Path], object]:
    return lambda path: rewrite_config(path, **changes)


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    return lambda path: rewrite_tensors(path, change)


ROUTER, BLOCKS = "model.layers.1.mlp.router.weight", EXPERTS.format(1) + "down_proj_blocks"
CASES = [
    Case(
        "model_type unknown", config(model_type="llama"), "config.json: model_type='llama' is unknown; known: gpt_oss"
    ),
    Case("model_type missing", config(model_type=None), "has no model_type"),
    Case(
        "more experts",
        config(num_local_experts=7),
        r"router.weight has shape \[5, 96\], .*num_local_experts=7.* gives \[7, 96\]",
    ),
    Case(
        "fewer experts",
        config(num_local_experts=4),
        r"router.weight has shape \[5, 96\], .*num_local_experts=4.* gives \[4, 96\]",
    ),
    Case(
        "more layers",
        config(num_hidden_layers=3, layer_types=["full_attention"] * 3),
        r"lacks model.layers.2\..* and \d+ more",
    ),
    Case(
        "fewer layers",
        config(num_hidden_layers=1, layer_types=["full_attention"]),
        r"holds model.layers.1\..* and \d+ more",
    ),
    Case(
        "other vocabulary",
        config(vocab_size=321),
        r"embed_tokens.weight has shape \[320, 96\].*vocab_size=321.*\[321, 96\]",
    ),
    Case("other hidden", config(hidden_size=128), r"has shape \[320, 96\].*hidden_size=128"),
    Case(
        "other intermediate",
        config(intermediate_size=96),
        r"gate_up_proj_blocks has shape \[5, 128, 3, 16\].*\[5, 192, 3, 16\]",
    ),
    Case("hidden no multiple of 32", config(hidden_size=100), "gate_up_proj: 100 columns cannot be stored in mxfp4"),
    Case(
        "tied although not",
        config(tie_word_embeddings=True),
        "holds lm_head.weight, which a model of its config.json does not have",
    ),
    Case("tensor missing", tensors(lambda t: t.pop(ROUTER)), f"lacks {ROUTER}, which"),
    Case("expert tensor missing", tensors(lambda t: t.pop(BLOCKS)), f"lacks {BLOCKS}, which"),
    Case("tensor too many", tensors(lambda t: t.update(more=torch.zeros(1))), "model.safetensors holds more, which"),
    Case(
        "wrong rank",
        tensors(lambda t: t.update({ROUTER: t[ROUTER][None].clone()})),
        r"has shape \[1, 5, 96\].*gives \[5, 96\]",
    ),
    Case(
        "wrong dtype",
        tensors(lambda t: t.update({ROUTER: t[ROUTER].to(torch.int64)})),
        f"{ROUTER} has dtype int64, expected bfloat16 or",
    ),
    Case(
        "wrong dtype of blocks",
        tensors(lambda t: t.update({BLOCKS: t[BLOCKS].view(torch.int8)})),
        f"{BLOCKS} has dtype int8, expected uint8",
    ),
    Case(
        "no quantization_config",
        config(quantization_config=None),
        "gate_up_proj_blocks, so mxfp4 experts, but .* says bf16",
    ),
    Case(
        "quant_method unknown",
        config(quantization_config={"quant_method": "awq"}),
        "quant_method='awq' is unknown; known: mxfp4, bf16",
    ),
    Case("quantization_config is text", config(quantization_config="mxfp4"), "quantization_config must be an object"),
    Case(
        "list of modules is text",
        config(quantization_config={"modules_to_not_convert": "a"}),
        "modules_to_not_convert a list",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_contradiction_is_refused_before_any_weight_is_read(case: Case, tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    case.spoil(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    headers = checkpoint.bytes_read
    with pytest.raises(UserError, match=case.says) as caught:
        load(checkpoint, rank_of(0, 1))
    assert "\n" not in str(caught.value) and checkpoint.bytes_read == headers


def test_bf16_experts_under_an_mxfp4_config(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, dtype_experts="bf16")
    rewrite_config(tmp_path, quantization_config={"quant_method": "mxfp4"})
    with pytest.raises(UserError, match=r"gate_up_proj, so bf16 experts, but .* says mxfp4"):
        load_rank(tmp_path)


@pytest.mark.parametrize("key", ["quant", "experts", "router", "combine", "placement", "dtype"])
def test_an_unknown_name_lists_the_known_ones(key: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    with pytest.raises(UserError, match=f"{key}='nope' is unknown; known: "):
        load(Checkpoint.open(tmp_path), rank_of(0, 1), **{key: "nope"})  # type: ignore[arg-type]


def test_more_ranks_than_experts(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    with pytest.raises(UserError, match="6 expert ranks cannot share 5 experts"):
        load_rank(tmp_path, rank=0, size=6)


def test_quantising_sizes_that_mxfp4_cannot_hold(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, dtype_experts="bf16", intermediate=40)
    load_rank(tmp_path)
    with pytest.raises(UserError, match="down_proj: 40 columns"):
        load_rank(tmp_path, quant="mxfp4")


def test_too_little_memory_names_both_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(tmp_path)
    monkeypatch.setattr("epmoe.load.free_bytes", lambda device: 1000)
    checkpoint = Checkpoint.open(tmp_path)
    headers = checkpoint.bytes_read
    with pytest.raises(
        UserError, match=r"too little memory on cpu: this rank's weights need [\d,]{7} bytes .* 1,000 are free"
    ):
        load(checkpoint, rank_of(0, 1))
    assert checkpoint.bytes_read == headers


def test_a_shard_lost_after_opening(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, shards=2)
    checkpoint = Checkpoint.open(tmp_path)
    assert (tmp_path / INDEX).exists()
    checkpoint.files[1].unlink()
    with pytest.raises(UserError, match="cannot be opened: No such file"):
        load(checkpoint, rank_of(0, 1))


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


@pytest.fixture
def device_limit() -> Iterator[Callable[[int], None]]:
    """A function that leaves this process so many more bytes of device memory than it holds."""
    total = torch.cuda.get_device_properties(0).total_memory

    def limit(more: int) -> None:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(0) + more) / total)

    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


@pytest.mark.gpu
def test_a_really_full_device_converts_on_the_host(
    device_limit: Callable[[int], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Encoding takes up to 100 MB beside the result, the weights take 40: with 70 MB only the host can convert."""
    make_checkpoint(tmp_path, dtype_experts="bf16", experts=8, hidden=1024, intermediate=1024)
    expected, _ = load_rank(tmp_path, quant="mxfp4", dtype="bfloat16")
    device_limit(70 << 20)
    model, _ = load_rank(tmp_path, quant="mxfp4", device="cuda:0", experts="reference")
    assert capsys.readouterr().err.count("converted on the host") == 1
    assert all(same(a, b) for a, b in zip(weights_of(model), weights_of(expected), strict=True))


@pytest.mark.gpu
def test_weights_that_do_not_fit_the_device(device_limit: Callable[[int], None], tmp_path: Path) -> None:
    make_checkpoint(tmp_path, experts=8, hidden=1024, intermediate=1024)
    device_limit(10 << 20)
    with pytest.raises(UserError, match=r"too little memory on cuda:0: this rank's weights need [\d,]+ bytes"):
        load_rank(tmp_path, device="cuda:0", experts="reference")
