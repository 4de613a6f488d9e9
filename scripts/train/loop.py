"""One recipe, from random weights to the best ones on held-out text.

Letters: B windows · S tokens of a window · E experts.
"""

import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from scripts.train import data
from scripts.train.model import Shape, TrainableGptOss

PROBE = (5, 25)  # a step's time is measured between these steps
EVALUATIONS = 20  # of a run
PATIENCE = 0.05  # stop when the held-out loss is this many nats above its best


@dataclass(frozen=True)
class Recipe:
    """How long and how hard. A batch is `batch` windows of Shape.context tokens."""

    epochs: float = 12
    batch: int = 32
    lr: float = 2e-3
    warmup: float = 0.05  # share of the steps
    weight_decay: float = 0.5  # far above the usual 0.1: few tokens, many parameters, several epochs
    dropout: float = 0.1
    balance: float = 0.03  # weight of the load-balancing loss
    clip: float = 1.0
    seed: int = 1


RECIPES = {
    "default": Recipe(),
    "long": Recipe(epochs=20, weight_decay=1.0, dropout=0.2),
}


@dataclass
class Result:
    """The best weights by held-out loss with MXFP4 experts, and how the run went."""

    recipe: Recipe
    steps: int
    shortened: bool = False
    state: dict[str, Tensor] = field(default_factory=dict)
    best: float = math.inf
    best_step: int = 0
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)

    def summary(self) -> dict[str, object]:
        """All but the weights, for training.json."""
        keys = ("steps", "shortened", "best", "best_step", "seconds", "tokens_per_second", "curve")
        return {"recipe": vars(self.recipe), **{key: getattr(self, key) for key in keys}}


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """A linear rise, then half a cosine down to zero."""
    warmup = max(1, int(recipe.warmup * steps))
    if step < warmup:
        return recipe.lr * (step + 1) / warmup
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def make_optimizer(model: TrainableGptOss, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; only matrices decay."""
    decays: dict[bool, list[Tensor]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        decays[parameter.dim() > 1 and not name.endswith("bias")].append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decays[True], "weight_decay": recipe.weight_decay},
        {"params": decays[False], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95), fused=True)


def batches(documents: list[Tensor], context: int, recipe: Recipe, device: torch.device) -> Iterator[Tensor]:
    """int64 [B, S+1], without end; an epoch's last, incomplete batch is left out."""
    rng = random.Random(recipe.seed)
    while True:
        windows_BS = data.epoch(documents, context, rng).to(device)
        for start in range(0, len(windows_BS) - recipe.batch + 1, recipe.batch):
            yield windows_BS[start : start + recipe.batch]


def train_step(model: TrainableGptOss, optimizer: torch.optim.AdamW, batch_BS: Tensor, recipe: Recipe) -> Tensor:
    """One update. Returns (loss in nats per token, load-balancing loss), on the device: nothing waits for it."""
    with torch.autocast(batch_BS.device.type, torch.bfloat16, enabled=batch_BS.is_cuda):
        logits, balance, _ = model(batch_BS[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch_BS[:, 1:].flatten())
    (loss + recipe.balance * balance).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return torch.stack((loss.detach(), balance.detach()))


@torch.no_grad()
def held_out_loss(model: TrainableGptOss, windows_BS: Tensor, autocast: bool) -> tuple[float, Tensor]:
    """Nats per token over windows [B, S+1], and each expert's share of its layer's choices, [layers, E]."""
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    total, counts = 0.0, []
    for part_BS in windows_BS.split(16):
        part_BS = part_BS.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            logits, _, count = model(part_BS[:, :-1])
        total += F.cross_entropy(logits.float().flatten(0, 1), part_BS[:, 1:].flatten(), reduction="sum").item()
        counts.append(count)
    model.train(was_training)
    count = torch.stack(counts).sum(0)
    return total / windows_BS[:, 1:].numel(), count / count.sum(-1, keepdim=True)


def train(
    recipe: Recipe,
    shape: Shape,
    documents: list[Tensor],
    held_out_BS: Tensor,
    device: torch.device,
    *,
    steps: int | None,
    limit_s: float,
    on_best: Callable[[Result], None],
) -> Result:
    """Train one recipe for its epochs (or `steps`); `on_best` is called at each evaluation that is the best so far.

    After the probe, steps that would not fit into `limit_s` seconds are cut from the schedule.
    """
    torch.manual_seed(recipe.seed)
    model = TrainableGptOss(shape, recipe.dropout).to(device)
    optimizer = make_optimizer(model, recipe)
    batch_tokens = recipe.batch * shape.context
    result = Result(recipe, steps or int(recipe.epochs * sum(map(len, documents)) / batch_tokens))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {result.steps} steps: {recipe}", flush=True)
    begin, probe, recent = time.perf_counter(), 0.0, []
    for step, batch_BS in enumerate(batches(documents, shape.context, recipe, device), 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step - 1, result.steps)
        recent.append(train_step(model, optimizer, batch_BS, recipe))
        if step in PROBE:
            recent[-1].tolist()  # waits for the device
            now = time.perf_counter()
            if step == PROBE[1]:
                _plan(result, step, (now - probe) / (PROBE[1] - PROBE[0]), limit_s - (now - begin), device)
            probe = now
        if step % max(1, result.steps // EVALUATIONS) == 0 or step == result.steps:
            losses, recent = torch.stack(recent).mean(0).tolist(), []
            result.seconds = round(time.perf_counter() - begin, 1)
            result.tokens_per_second = round(step * batch_tokens / (time.perf_counter() - begin))
            if not _evaluate(model, result, step, losses, held_out_BS, on_best):
                break
        if step == result.steps:
            break
    return result


def _plan(result: Result, step: int, step_s: float, left_s: float, device: torch.device) -> None:
    """Say what the probe found; shorten the schedule to what fits."""
    memory = f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB" if device.type == "cuda" else "not measured"
    print(f"probe: {step_s * 1e3:.1f} ms a step, {result.steps * step_s:.0f} s expected, memory {memory}", flush=True)
    fits = step + int(max(0.0, left_s) / (step_s * 1.1))  # a tenth for the evaluations
    if fits < result.steps:
        print(f"shortened from {result.steps} to {fits} steps, which fit", flush=True)
        result.steps, result.shortened = fits, True


def _evaluate(
    model: TrainableGptOss,
    result: Result,
    step: int,
    losses: list[float],
    held_out_BS: Tensor,
    on_best: Callable[[Result], None],
) -> bool:
    """Evaluate, log, keep the best. False ends the run: the loss rises, or is not finite."""
    loss, share = held_out_loss(model, held_out_BS, autocast=next(model.parameters()).is_cuda)
    result.curve.append({"step": step, "train": round(losses[0], 4), "held_out": round(loss, 4)})
    print(
        f"step {step}/{result.steps} train {losses[0]:.4f} held-out {loss:.4f} balance {losses[1]:.3f} least used "
        f"expert {share.min().item():.2%} {result.tokens_per_second:,} tokens/s {result.seconds:.0f} s",
        flush=True,
    )
    if loss < result.best:
        result.best, result.best_step = loss, step
        result.state = {name: value.detach().clone() for name, value in model.state_dict().items()}
        on_best(result)
    if not math.isfinite(losses[0]) or not loss <= result.best + PATIENCE:
        print("the held-out loss rises, or the loss is not finite: stopped early", flush=True)
        return False
    return True
