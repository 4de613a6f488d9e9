"""Slots on two and three ranks: the bits of one, experts gathered when saving; and over the library's own experts."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from moe_families import FAMILIES, Ran, config_of, examples, load, logits, make, printed, run, saved, stored
from spawn import run_ranks

from epmoe.errors import UserError
from epmoe.moe.experts.reference import ReferenceExperts
from epmoe.ranks.mesh import Ranks

FOREIGN = "tests.integrations.transformers.test_packed:Turned"


def all_families(ranks: Ranks, folder: Path) -> dict[str, Ran]:
    """What this rank says; what the ranks save lies in <family>-<ranks>."""
    from epmoe.integrations.transformers import expert_parallel

    torch.set_num_threads(1)
    return {
        family: run(
            folder / family,
            folder / f"{family}-{ranks.size}",
            distributed_config=expert_parallel(config_of(family), ranks.size),
        )
        for family in FAMILIES
    }


def others(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """The library's experts under our exchange, ours under its exchanges; a backend that takes weights over."""
    from transformers.distributed import DistributedConfig

    from epmoe.integrations.transformers import EpmoeConfig, expert_parallel, replace_with_epmoe_experts

    path, whole = folder / "qwen3_moe", expert_parallel(config_of("qwen3_moe"), ranks.size)
    theirs = {  # attention is split, too
        name: DistributedConfig(tp_size=ranks.size, ep_size=ranks.size, ep_implementation=name)
        for name in ("slots", "auto", "all_to_all")
    }
    theirs["without ep"] = DistributedConfig(tp_size=ranks.size)
    foreign = load(path, quantization_config=EpmoeConfig(experts=FOREIGN), distributed_config=whole)
    made = {
        name: load(path, quantization_config=EpmoeConfig(), distributed_config=each) for name, each in theirs.items()
    }
    made["eager"] = load(path, distributed_config=whole)
    made["foreign"] = foreign
    made["plain"] = load(path, experts_implementation="epmoe", distributed_config=theirs["without ep"])
    found: dict[str, Any] = {name: logits(model) for name, model in made.items()}
    found["here"] = [name for name, _ in foreign.named_parameters() if "_blocks" in name]
    foreign.save_pretrained(folder / "foreign-2")
    found["packs"] = packs_of_a_forward(made["slots"])
    found["page"] = printed(examples()[1])
    with pytest.raises(UserError, match="Qwen3MoeExperts: its experts are spread over ranks already"):
        replace_with_epmoe_experts(made["eager"], EpmoeConfig())
    try:
        load(folder / "five", distributed_config=expert_parallel(config_of("qwen3_moe", num_experts=5), ranks.size))
    except ValueError as error:
        found["refused"] = str(error)
    return found


def packs_of_a_forward(model: Any) -> int:
    """How often a forward packs experts anew."""
    with mock.patch.object(ReferenceExperts, "pack", wraps=ReferenceExperts.pack) as pack:
        logits(model)
    return pack.call_count


def both(ranks: Ranks, folder: Path) -> tuple[dict[str, Ran], dict[str, Any]]:
    """One start of two ranks, as transformers takes seconds to import."""
    return all_families(ranks, folder), others(ranks, folder)


def check(size: int, ran: list[dict[str, Ran]], folder: Path, alone: dict[str, Ran]) -> None:
    """Every rank says what one rank says, and what they saved together is what one rank saved."""
    for family in FAMILIES:
        assert [each[family].differences(alone[family]) for each in ran] == [[]] * size, family
        for kind in ("packed", "plain"):
            found, expected = (stored(folder / f"{family}-{each}" / kind) for each in (size, 1))
            assert found.keys() == expected.keys(), (family, kind)
            assert all(torch.equal(found[name], expected[name]) for name in found), (family, kind)
            config, first = (folder / f"{family}-{each}" / kind / "config.json" for each in (size, 1))
            assert "distributed" not in first.read_text() and config.exists()


def test_two_ranks(folder: Path, alone: dict[str, Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    saved(make("qwen3_moe", num_experts=5), folder / "five")
    ran = run_ranks(both, 2, folder, timeout=150)
    check(2, [families for families, _ in ran], folder, alone)
    expected, plain = alone["qwen3_moe"].packed, logits(load(folder / "qwen3_moe"))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    page = printed(examples()[1]).replace("on 1 ranks", "on 2 ranks")
    for _, found in ran:
        assert found["page"] == page and found["packs"] == 0
        assert torch.equal(found["foreign"], expected) and found["here"] == []
        # eager adds a token's experts in the order of their ids, slots in that of the choices
        assert (found["eager"] - plain).abs().max() < 1e-5 * plain.std()
        for name in ("slots", "auto", "all_to_all", "without ep"):  # sums of attention's parts, in another order
            assert (found[name] - expected).abs().max() < 1e-4 * expected.std(), name
        assert (found["plain"] - plain).abs().max() < 1e-4 * plain.std()
        assert "Cannot evenly shard 5 experts across 2" in found["refused"]
    assert torch.equal(ran[0][1]["eager"], ran[1][1]["eager"])
    found, first = stored(folder / "foreign-2"), stored(folder / "qwen3_moe-1" / "packed")
    assert found.keys() == first.keys() and all(torch.equal(found[name], first[name]) for name in found)


@pytest.mark.slow
def test_three_ranks(folder: Path, alone: dict[str, Ran]) -> None:
    check(3, run_ranks(all_families, 3, folder, timeout=150), folder, alone)
