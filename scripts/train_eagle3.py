"""Trains an EAGLE3 head for the embedded model, on the same text; it learns the model's own distribution.

    python3 scripts/train_eagle3.py --out epmoe/demo/eagle3    # one GPU
    python3 scripts/train_eagle3.py --out /tmp/head --quick    # the whole path in seconds on a CPU; drafts nonsense

The directory gets config.json and model.safetensors in the published layout (epmoe/weights/eagle3.py), and
training.json: settings, times, and how many tokens a step of greedy decoding brings with drafts of the head, by the
length of the drafts, measured on answers of the model to held-out text.

The run ends after its epochs or after --seconds seconds, whichever comes first; the learning rate falls accordingly.
"""

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a training machine needs no installation of epmoe

from scripts.train import accepted, data
from scripts.train.eagle3 import HeadShape, TrainableHead, features, read_target
from scripts.train.model import TrainableGptOss

DEMO = Path(__file__).resolve().parents[1] / "epmoe" / "demo"


@dataclass(frozen=True)
class Recipe:
    """How long and how hard. A batch is `batch` windows of `window` tokens."""

    epochs: float = 8
    batch: int = 8
    window: int = 256
    steps: int = 4  # of the training-time test
    decay: float = 0.8  # of the loss's weight, from one of these to the next
    lr: float = 2e-3
    warmup: float = 0.05  # share of the run
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 1


QUICK_SHAPE = replace(HeadShape(), intermediate=64, draft_vocab=256, heads=2)
QUICK_RECIPE = replace(Recipe(), batch=4, window=48, steps=2, epochs=0.03)
QUICK_ANSWERS = accepted.Answers(prompts=2, prompt_tokens=12, new_tokens=12)
SAMPLE_ANSWERS = accepted.Answers(prompts=4, prompt_tokens=48, new_tokens=48)  # tests/demo/test_eagle3.py's
DEPTH = 5  # of the drafts that are measured, at most
LOG_EVERY = 20  # updates of a CPU; 25 times as many of a GPU


def loss_of(
    head: TrainableHead, target: TrainableGptOss, token_BS: Tensor, recipe: Recipe
) -> tuple[Tensor, list[Tensor]]:
    """Nats of the target's distribution that the head pays, all steps weighed; and how often each step's best is right.

    Where the target gives its probability to ids that the head does not have, nothing is learned: that much less does
    the position count.
    """
    count = token_BS.shape[1] - recipe.steps
    feature_BSX, logits_BSV = features(target, head.shape.layers, token_BS)
    wanted_BSA = logits_BSV.float().softmax(-1)[..., head.id_A]
    best_BS = logits_BSV.argmax(-1)
    embedded_BSH = target.model.embed_tokens(token_BS[:, 1:])
    total, agreed = torch.zeros((), device=token_BS.device), []
    for step, logits_BSA in enumerate(head(embedded_BSH, feature_BSX[:, :count], recipe.steps)):
        there = slice(step + 1, step + 1 + count)
        nats_BS = -(wanted_BSA[:, there] * logits_BSA.float().log_softmax(-1)).sum(-1)
        total = total + recipe.decay**step * nats_BS.mean()
        agreed.append((head.id_A[logits_BSA.argmax(-1)] == best_BS[:, there]).float().mean())
    return total, agreed


def batches(documents: list[Tensor], recipe: Recipe, device: torch.device) -> Iterator[Tensor]:
    """int64 [B, S], without end."""
    rng = random.Random(recipe.seed)
    while True:
        windows_BS = data.epoch(documents, recipe.window - 1, rng)
        for start in range(0, len(windows_BS) - recipe.batch + 1, recipe.batch):
            yield windows_BS[start : start + recipe.batch].to(device)


def learning_rate(recipe: Recipe, progress: float) -> float:
    """A linear rise, then half a cosine down to zero."""
    if progress < recipe.warmup:
        return recipe.lr * (progress / recipe.warmup + 0.01)
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - recipe.warmup) / (1 - recipe.warmup))))


def train(
    head: TrainableHead, target: TrainableGptOss, documents: list[Tensor], recipe: Recipe, seconds: float
) -> dict[str, Any]:
    """Train the head; what is worth keeping of the run."""
    device = next(head.parameters()).device
    matrices = [parameter for parameter in head.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in head.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95), fused=True)
    updates = max(1, int(recipe.epochs * sum(map(len, documents)) / (recipe.batch * recipe.window)))
    every = min(LOG_EVERY if device.type == "cpu" else 25 * LOG_EVERY, max(1, updates // 4))
    begin, recent, curve = time.perf_counter(), [], []
    step = 0
    for step, token_BS in enumerate(batches(documents, recipe, device), 1):
        progress = max((step - 1) / updates, (time.perf_counter() - begin) / seconds)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, progress)
        with torch.autocast(device.type, torch.bfloat16):
            loss, agreed = loss_of(head, target, token_BS, recipe)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent.append(torch.stack((loss.detach(), *agreed)))
        ended = progress >= 1 or step == updates
        if step % every == 0 or ended:
            nats, *shares = torch.stack(recent).mean(0).tolist()
            recent = []
            passed = time.perf_counter() - begin
            curve.append({"step": step, "loss": round(nats, 4), "right": [round(share, 4) for share in shares]})
            print(f"step {step}/{updates} {passed:.0f} s loss {nats:.4f} right {shares}", flush=True)
        if ended:
            break
    return {
        "updates": step,
        "seconds": round(time.perf_counter() - begin, 1),
        "curve": curve[:: -max(1, len(curve) // 20)][::-1],
    }


def draft_ids(documents: list[Tensor], vocab: int, count: int) -> Tensor:
    """int64 [A], ascending: the ids that are most frequent in the text."""
    return torch.bincount(torch.cat(documents), minlength=vocab).topk(count).indices.sort().values


def answers(head: TrainableHead, target: TrainableGptOss, directory: Path, asked: accepted.Answers) -> dict[str, Any]:
    """What the head's drafts bring to the target's answers, in float32."""
    prompt_BP = asked.prompt_BP(directory).to(next(head.parameters()).device)
    token_BS = accepted.greedy(target, prompt_BP, asked.new_tokens)
    draft_BSK = accepted.drafts(head, target, token_BS, DEPTH)
    return asdict(asked) | accepted.measure(token_BS, draft_BSK, asked.prompt_tokens - 1)


def save(directory: Path, head: TrainableHead, target: TrainableGptOss) -> int:
    """Write config.json and model.safetensors. Returns their bytes."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(head.shape.config(target), indent=2) + "\n")
    save_file(head.stored(target.shape.vocab), directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "model.safetensors").chmod(0o644)
    return sum((directory / name).stat().st_size for name in ("config.json", "model.safetensors"))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--target", type=Path, default=DEMO, help="what train_demo.py has written")
    parser.add_argument("--seconds", type=float, default=500, help="of training, at most")
    parser.add_argument("--threads", type=int, help="of a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="a few updates of a tiny head")
    for name, kind in {"epochs": float, "batch": int, "steps": int, "lr": float}.items():
        parser.add_argument(f"--{name}", type=kind, help="instead of the recipe's")
    return parser.parse_args()


def main() -> None:
    begin, args = time.perf_counter(), parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    given = {name: vars(args)[name] for name in ("epochs", "batch", "steps", "lr") if vars(args)[name] is not None}
    recipe = replace(QUICK_RECIPE if args.quick else Recipe(), **given)
    torch.manual_seed(recipe.seed)
    target = read_target(args.target).to(args.device)
    tokenizer = Tokenizer.from_file(str(args.target / "tokenizer.json"))
    documents = data.encode(tokenizer, data.split(data.read_corpus())[0][:: 20 if args.quick else 1])
    shape = QUICK_SHAPE if args.quick else HeadShape()
    id_A = draft_ids(documents, target.shape.vocab, shape.draft_vocab)
    head = TrainableHead(shape, target, id_A).to(args.device)
    print(f"{sum(p.numel() for p in head.parameters()):,} parameters: {recipe}", flush=True)
    run = train(head, target, documents, recipe, args.seconds)
    head.load_state_dict({name: value.to(torch.bfloat16).float() for name, value in head.state_dict().items()})
    record = {
        "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else "CPU",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "shape": asdict(shape),
        "recipe": asdict(recipe),
        "run": run,
        "bytes": save(args.out, head, target),
        "answers": answers(head, target, args.target, QUICK_ANSWERS if args.quick else accepted.Answers()),
        "sample": answers(head, target, args.target, QUICK_ANSWERS if args.quick else SAMPLE_ANSWERS),
    }
    record["seconds"] = round(time.perf_counter() - begin, 1)
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({key: record[key] for key in ("answers", "sample", "bytes", "seconds")}), flush=True)


if __name__ == "__main__":
    main()
