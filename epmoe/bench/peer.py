"""Who is measured beside this engine: the same prompts, the same two lengths.

hub: this engine once more, with experts=hub, which leaves all but the experts as it is.

transformers: its GptOssForCausalLM on the same checkpoint, as its users get it: eager decoding, on an accelerator its
MXFP4 kernels where they are installed (otherwise it turns the experts into bf16 and says so), on the CPU experts in the
model's dtype.
"""

import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from epmoe.bench.conditions import Record
from epmoe.bench.decode import Batch
from epmoe.bench.options import BenchConfig
from epmoe.errors import UserError
from epmoe.moe.experts.hub.kernel import kernel_package
from epmoe.ranks.mesh import Ranks
from epmoe.weights.checkpoint import Checkpoint
from epmoe.weights.choices import DTYPES


def check(config: BenchConfig, ranks: int) -> None:
    """Raises UserError where the peer cannot run, before anything is measured."""
    if config.compare == "hub":
        kernel_package(config.hub.kernel)
        return
    if ranks > 1:
        raise UserError("compare=transformers runs on one rank: its own expert parallelism is not measured here")
    try:
        from transformers import GptOssForCausalLM  # noqa: F401
    except ImportError as error:
        raise UserError(f"compare=transformers: {error}; install transformers") from error


class Transformers:
    """The model, loaded."""

    def __init__(self, path: Path, quantised: bool, dtype: torch.dtype, device: torch.device) -> None:
        import transformers

        begin = time.perf_counter()
        extra: dict[str, Any] = {"device_map": str(device)} if device.type != "cpu" else {}
        if device.type == "cpu" and quantised:  # there are no MXFP4 kernels for it
            extra["quantization_config"] = transformers.Mxfp4Config(dequantize=True)
        self.model = transformers.GptOssForCausalLM.from_pretrained(path, dtype=dtype, **extra).eval()
        self.device, self.release = device, transformers.__version__
        self.experts = type(self.model.model.layers[0].mlp.experts).__name__  # tells which kernels it found
        self.load_s = time.perf_counter() - begin

    def seconds(self, ids_BP: torch.Tensor, new: int) -> float | None:
        """Seconds until each prompt has `new` tokens, greedy; None when memory runs out."""
        ids_BP = ids_BP.to(self.device)
        begin = time.perf_counter()
        try:
            with torch.inference_mode():
                out = self.model.generate(
                    ids_BP,
                    attention_mask=torch.ones_like(ids_BP),
                    min_new_tokens=new,
                    max_new_tokens=new,
                    do_sample=False,
                    pad_token_id=0,
                )
            assert out.shape[1] == ids_BP.shape[1] + new
            out.tolist()  # waits for the device
        except torch.OutOfMemoryError:
            return None
        return time.perf_counter() - begin

    def median_s(self, ids_BP: torch.Tensor, new: int, repeat: int) -> float | None:
        """The median of so many runs after a warm-up; None where memory ran out in all of them."""
        self.seconds(ids_BP, new)
        times = [taken for taken in (self.seconds(ids_BP, new) for _ in range(repeat)) if taken is not None]
        return statistics.median(times) if times else None


def add_other(record: Record, other: Record, config: BenchConfig) -> None:
    """What the same measurements gave with other experts, `other`, beside those of `record`."""
    facts = {"release": version("kernels"), "experts": config.hub.kernel, "load_s": other["load_s"]}
    record["peer"] = {"name": f"experts={other['experts']}", **facts, "measured": other}
    rows = [*zip(record["decode"], other["decode"], strict=True), *zip(record["first"], other["first"], strict=True)]
    for row, theirs in rows:
        row |= {"peer_ms": theirs["ms"], "speedup": theirs["ms"] / row["ms"]}
    if record["prefill"]:
        record["prefill"]["peer_tokens_per_s"] = other["prefill"]["tokens_per_s"]


def add_peer(record: Record, config: BenchConfig, source: Checkpoint, ranks: Ranks) -> None:
    """The same measurements of transformers, but for mixed steps; None where its memory ran out."""
    quantised = bool(source.config.get("quantization_config"))
    other = Transformers(source.path, quantised, DTYPES[record["dtype"]], ranks.device)
    facts = {"release": other.release, "experts": other.experts, "load_s": other.load_s}
    record["peer"] = {"name": config.compare, **facts}
    short, long = config.lengths
    vocab = source.config["vocab_size"]

    def difference(ids_BP: torch.Tensor) -> float | None:
        whole, less = other.seconds(ids_BP, long), other.seconds(ids_BP, short)
        return None if whole is None or less is None else (whole - less) / (long - short)

    def compare(row: Record, taken_s: float | None) -> None:
        row["peer_ms"] = None if taken_s is None else 1e3 * taken_s
        row["speedup"] = None if taken_s is None else row["peer_ms"] / row["ms"]

    for row in record["decode"]:
        ids_BP = Batch.of(row["batch"], config.prompt_tokens, vocab).ids_BP
        other.seconds(ids_BP, short)
        steps = [step for step in (difference(ids_BP) for _ in range(config.repeat)) if step is not None]
        compare(row, statistics.median(steps) if steps else None)
    for row in record["first"]:
        compare(row, other.median_s(Batch.of(1, row["tokens"], vocab).ids_BP, 1, config.repeat))
    if config.prefill:
        ids_BP = Batch.of(*config.prefill, vocab).ids_BP
        taken_s = other.median_s(ids_BP, 1, config.repeat)
        record["prefill"]["peer_tokens_per_s"] = None if taken_s is None else ids_BP.numel() / taken_s
