"""The held-out loss of a checkpoint through epmoe's own path: loader, router, experts, combine, cache.

    python3 scripts/train/evaluate.py epmoe/demo                       # the windows of tests/demo/test_demo.py
    torchrun --nproc-per-node 2 scripts/train/evaluate.py epmoe/demo   # the same figure, to the bit

Letters: S tokens of a window · V vocabulary.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from epmoe.batch import Step
from epmoe.config.compose import from_keys
from epmoe.llm import LLM
from epmoe.ranks import command, mesh
from epmoe.ranks.mesh import Ranks
from scripts.train import data


def sample_windows(directory: Path) -> Tensor:
    """int64 [B, S+1]: the held-out windows that training.json records as `held_out_sample`."""
    recorded = json.loads((directory / "training.json").read_text())["held_out_sample"]
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    return data.held_out_windows(tokenizer, recorded["context"], recorded["windows"])


def held_out_loss(ranks: Ranks, directory: Path, windows_BS: Tensor) -> tuple[float, Tensor]:
    """Mean nats per token, and how many tokens chose each expert, int64 [layers, E].

    float32 throughout, and experts combined by slots: the same bits on any number of ranks.
    """
    length = windows_BS.shape[1] - 1
    keys = {"combine": "slots", "runtime": {"dtype": "float32", "progress": False}}
    llm = LLM.opened(from_keys({"checkpoint": str(directory), **keys}), ranks)
    llm.load([length])
    config, cache = llm.architecture, llm.cache
    choices = torch.zeros(config.layers, config.num_experts, dtype=torch.int64, device=ranks.device)
    for layer, count_E in zip(llm.model.moe_layers(), choices, strict=True):
        layer.router.register_forward_hook(partial(_count, count_E, config.top_k))
    total = 0.0
    for window_S in windows_BS:
        sequence = cache.admit(length)
        index = torch.arange(length, device=ranks.device)
        tokens = window_S.to(ranks.device)
        step = Step(tokens[:-1], index, index[:0], spans=((0, length, 0, sequence),), output_O=index)
        with torch.inference_mode():
            logits_SV = llm.model(step, cache)
        total += F.cross_entropy(logits_SV.double(), tokens[1:], reduction="sum").item()
        cache.release(sequence)
    return total / (len(windows_BS) * length), choices.cpu()


def _count(count_E: Tensor, top_k: int, router: torch.nn.Module, inputs: object, logits_TE: Tensor) -> None:
    """A hook of a router: adds the choices of its tokens to `count_E`."""
    count_E += torch.bincount(logits_TE.topk(top_k).indices.flatten(), minlength=len(count_E))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    with mesh.start(device=args.device) as ranks:
        loss, choices = held_out_loss(ranks, args.checkpoint, sample_windows(args.checkpoint))
        if ranks.is_main:
            share = choices.min().item() / choices[0].sum().item()
            print(f"{loss!r} nats per held-out token, {ranks.size} ranks, least used expert {share:.2%}")


if __name__ == "__main__":
    command.main(main)
