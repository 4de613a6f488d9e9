"""Slots over any experts implementation, and what transformers refuses."""

from pathlib import Path
from typing import Any

import torch
from moe_families import config_of, load, logits, make, saved, stored
from spawn import run_ranks

from epmoe.ranks.mesh import Ranks


def generic(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """The library's own experts under our exchange; a backend that takes weights over; attention split."""
    from transformers.distributed import DistributedConfig

    from epmoe.integrations.transformers import EpmoeConfig, expert_parallel

    torch.set_num_threads(1)
    whole = expert_parallel(config_of("qwen3_moe"), ranks.size)
    eager = load(folder / "plain", distributed_config=whole)
    foreign = load(
        folder / "plain",
        quantization_config=EpmoeConfig(experts="tests.integrations.transformers.test_packed:Turned"),
        distributed_config=whole,
    )
    split = DistributedConfig(tp_size=ranks.size, ep_size=ranks.size, ep_implementation="slots")
    cut = load(folder / "plain", quantization_config=EpmoeConfig(), distributed_config=split)
    tensor = load(
        folder / "plain", quantization_config=EpmoeConfig(), distributed_config=DistributedConfig(tp_size=ranks.size)
    )
    local = [name for name, _ in foreign.named_parameters() if "_blocks" in name]
    foreign.save_pretrained(folder / "foreign")
    try:
        load(folder / "five", distributed_config=expert_parallel(config_of("qwen3_moe", num_experts=5), ranks.size))
        refused = ""
    except ValueError as error:
        refused = str(error)
    made = {"eager": eager, "foreign": foreign, "cut": cut, "tensor": tensor}
    return {"local": local, "refused": refused, **{name: logits(model) for name, model in made.items()}}


def test_on_two_ranks(tmp_path: Path) -> None:
    from epmoe.integrations.transformers import EpmoeConfig

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    source = saved(make("qwen3_moe"), tmp_path / "plain")
    saved(make("qwen3_moe", num_experts=5), tmp_path / "five")
    first, second = run_ranks(generic, 2, tmp_path, timeout=120)
    packed = load(source, quantization_config=EpmoeConfig())
    expected, plain = logits(packed), logits(load(source))
    for ran in (first, second):
        assert torch.equal(ran["foreign"], expected) and ran["local"] == []
        # eager adds a token's experts in the order of their ids, slots in that of the choices
        assert (ran["eager"] - plain).abs().max() < 1e-5 * plain.std()
        # sums of attention's parts, in another order
        for name in ("cut", "tensor"):
            assert (ran[name] - expected).abs().max() < 1e-4 * expected.std()
        assert "Cannot evenly shard 5 experts across 2" in ran["refused"]
    assert torch.equal(first["eager"], second["eager"])
    found, alone = stored(tmp_path / "foreign"), stored(saved(packed, tmp_path / "alone"))
    assert found.keys() == alone.keys() and all(torch.equal(found[name], alone[name]) for name in found)
    torch.set_num_threads(threads)
