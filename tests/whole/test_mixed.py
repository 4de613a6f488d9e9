"""Ranks that differ: one line names the rank and what differs, every rank ends with 2, no text comes."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from loading import rewrite_config, rewrite_tensors
from spawn import commands

from epmoe.ranks import machine
from epmoe.weights import choices

PROMPT = ["prompt=It was a fine morning", "max_new_tokens=8", "sampling.ignore_eos=true"]
KEYS, COPY = "start every rank with the same keys", "give every rank the same copy of the checkpoint"


def generate(keys: list[list[str]], spoil: Callable[[], None] | None = None) -> None:
    """The real command; `keys` of each rank, and what is different on the last one."""
    from epmoe.generate import generate as body

    rank = int(os.environ["RANK"])
    if spoil is not None and rank == len(keys) - 1:
        spoil()
    sys.argv[1:] = ["runtime.device=cpu", *PROMPT, *keys[rank]]
    body()


def refused(keys: list[list[str]], folder: Path, spoil: Callable[[], None] | None = None) -> str:
    """The line about two ranks that differ."""
    with commands(generate, len(keys), keys, spoil, folder=folder) as started:
        assert [each.wait(90) for each in started] == [2] * len(keys), [each.stderr for each in started]
        errors = [line for line in started[0].stderr.splitlines() if " (auto" not in line and "auto chose" not in line]
        assert len(errors) == 1 and errors[0].startswith("epmoe: error: ")
        assert [each.stderr for each in started[1:]] == [""] * (len(keys) - 1)
        assert [each.stdout for each in started] == [""] * len(keys)
        return errors[0].removeprefix("epmoe: error: ")


@dataclass(frozen=True)
class Case:
    name: str
    rank_0: list[str]
    rank_1: list[str]
    says: str


CASES = [
    Case("chunk", ["runtime.prefill_chunk=8"], ["runtime.prefill_chunk=16"], "runtime.prefill_chunk={}=16, {}=8"),
    Case("combine", ["combine=slots"], ["combine=all_reduce"], "combine={}=all_reduce, {}=slots"),
    Case("attention", [], ["mesh.attention=data"], "mesh.attention={}=data, {}=replicate"),
    Case("dtype", [], ["runtime.dtype=bfloat16"], "runtime.dtype={}=bfloat16, {}=auto"),
    Case("device", [], ["runtime.device=cuda"], "runtime.device={}=cuda, {}=cpu"),
]


SOME = ("combine", "device")  # tests/config/test_agreed.py has the comparison of all


@pytest.mark.parametrize(
    "case",
    [pytest.param(each, id=each.name, marks=() if each.name in SOME else pytest.mark.slow) for each in CASES],
)
def test_another_setting(case: Case, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Before the process group: its backend, its messages' sizes and their dtypes follow from settings."""
    key, values = case.says.split("=", 1)
    theirs, ours = values.replace("{}=", "").split(", ")
    checkpoint = f"checkpoint={tiny_checkpoint}"
    line = refused([[checkpoint, *case.rank_0], [checkpoint, *case.rank_1]], tmp_path)
    assert line == f"rank 1 has {key}={theirs}, rank 0 {key}={ours}: {KEYS}"


def other_triton() -> None:
    machine.version = lambda distribution_name: "2.0.0"


def other_sources() -> None:
    machine.PACKAGE = Path(__file__).parent


def no_backend() -> None:
    choices.exchange.by_nodes = lambda nodes: "all_reduce"


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (other_triton, "rank 2 has triton=2.0.0, rank 0 triton="),
        (other_sources, "rank 2 has epmoe=sources "),
        (no_backend, "rank 2 has combine=all_reduce, rank 0 combine=slots: name it, in the place of auto"),
    ],
)
def test_another_release_or_choice(spoil: Callable[[], None], says: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert refused([[f"checkpoint={tiny_checkpoint}"]] * 3, tmp_path, spoil).startswith(says)


def another_value(path: Path) -> None:
    rewrite_tensors(path, lambda tensors: tensors["model.layers.1.mlp.router.weight"][2, 3:5].neg_())


def another_config(path: Path) -> None:
    rewrite_config(path, swiglu_limit=6.5)


def experts_in_another_order(path: Path) -> None:
    """Each expert lives on one rank; the text of such a mixture would be neither copy's."""

    def turn(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "layers.0.mlp.experts." in name]:
            tensors[name] = tensors[name].flip(0)

    rewrite_tensors(path, turn)


def another_table(path: Path) -> None:
    rewrite_tensors(path, lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"].float()}))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (another_value, "digest(model.layers.1.mlp.router.weight)="),
        (another_config, "config.json's swiglu_limit=6.5, rank 0 config.json's swiglu_limit=7.0: "),
        (experts_in_another_order, "digest(a sample of the experts of model.layers.0)="),
        (another_table, "digest(names, shapes and dtypes of lm_head.weight)="),
    ],
)
def test_another_copy_of_the_checkpoint(
    change: Callable[[Path], None], says: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    change(tmp_path / "copy")
    line = refused([[f"checkpoint={tiny_checkpoint}"], [f"checkpoint={tmp_path}/copy"]], tmp_path)
    assert line.startswith(f"rank 1 has {says}") and line.endswith(COPY) and "more differ" not in line


def test_what_a_rank_may_have_for_itself(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Paths, what rank 0 alone reads, bounds of waits: the text is that of ranks which all have rank 0's."""
    shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    (tmp_path / "copy" / "generation_config.json").unlink(missing_ok=True)
    first = [f"checkpoint={tiny_checkpoint}", f"output={tmp_path}/mixed.jsonl"]
    own = ["prompt=other", "max_new_tokens=3", "sampling.seed=7", "runtime.timeout_s=90", "chat=off"]
    ids = []
    for keys in ([first, [f"checkpoint={tmp_path}/copy", *own]], [first, first]):
        with commands(generate, 2, keys, folder=tmp_path) as started:
            assert [each.wait(90) for each in started] == [0, 0], started[0].stderr
        ids.append(json.loads((tmp_path / "mixed.jsonl").read_text())["ids"])
    assert ids[0] == ids[1] and len(ids[0]) == 8
