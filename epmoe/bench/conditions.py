"""Which model a benchmark runs, and what a reader must know to compare its numbers with others."""

from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from epmoe.bench.weights import RandomCheckpoint, byte_tokenizer
from epmoe.config.schema import ModelKeys
from epmoe.errors import UserError
from epmoe.llm import LLM
from epmoe.ranks.mesh import Ranks
from epmoe.streams import tell
from epmoe.weights.checkpoint import Checkpoint
from epmoe.weights.hub import resolve

Record = dict[str, Any]  # what a line of JSON holds


def open_source(size: str | None, checkpoint: str, ranks: Ranks) -> Checkpoint:
    """The checkpoint that was asked for, or random weights; says on standard error which size was chosen."""
    if checkpoint:
        return Checkpoint.open(resolve(checkpoint))
    chosen = size or ("tiny" if ranks.device.type == "cpu" else "20b")
    if not size and ranks.is_main:
        tell(f"epmoe: neither checkpoint nor size given: size={chosen}")
    return RandomCheckpoint.of(chosen)


def open_model(config: ModelKeys, size: str | None, ranks: Ranks) -> LLM:
    """The model before its weights are read; one that has no tokenizer gets one that knows bytes, for `generate`.

    Raises:
        UserError: there are several replicas.
    """
    if ranks.replicas > 1:
        raise UserError(
            f"mesh.replica={ranks.replicas} means nothing to a benchmark, which measures one replica: leave it at 0"
        )
    llm = LLM.opened(config, ranks, open_source(size, config.checkpoint, ranks))
    if llm.source.tokenizer_file is None:
        llm.tokenizer = byte_tokenizer(llm.architecture.vocab)
    return llm


def conditions(bench: str, llm: LLM) -> Record:
    """Of a model that is loaded: what ran, with which parts, where."""
    device, report = llm.ranks.device, llm.report
    accelerated = device.type != "cpu"
    return {
        "bench": bench,
        "model": llm.source.path.name,
        "device": torch.get_device_module(device).get_device_name(device) if accelerated else "cpu",
        "ranks": llm.ranks.size,
        "nodes": llm.ranks.nodes,
        "torch": torch.__version__,
        "triton": _release("triton"),
        **{key: getattr(report, key) for key in ("dtype", "quant", "experts", "router", "combine", "attention")},
        "graphs": llm.engine.config.graphs,
        "runtime": asdict(llm.config.runtime),
    }


def heading(record: Record) -> str:
    """The conditions in one line, for people."""
    return (
        f"{record['model']} on {record['ranks']} x {record['device']} (nodes: {record['nodes']}), {record['dtype']}, "
        f"quant {record['quant']}, experts {record['experts']}, router {record['router']}, "
        f"combine {record['combine']}, attention {record['attention']}, graphs {'on' if record['graphs'] else 'off'}; "
        f"torch {record['torch']}, triton {record['triton']}"
    )


def markdown(heads: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a table of numbers."""
    return [_cells(heads), "|" + "--:|" * len(heads), *map(_cells, rows)]


def _cells(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _release(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
