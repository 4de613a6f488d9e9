"""Trains the embedded model: gpt-oss in small, on public-domain English, its experts through MXFP4.

    python3 scripts/train_demo.py --out epmoe/demo             # one GPU, a few minutes
    python3 scripts/train_demo.py --out /tmp/demo --quick      # the whole path in seconds on a CPU; writes nonsense

The directory gets a complete checkpoint at every evaluation that is the best so far (so a run that is cut leaves one), and
at the end training.json: settings, times, the held-out losses with bf16 and with MXFP4 experts, samples and their checks.
The number of steps is fixed by the epochs; only where a step is so slow that they would not fit into --limit seconds is the
schedule shortened, which the log and training.json say.
"""

import argparse
import json
import math
import random
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a training machine needs no installation of epmoe

from train import data  # noqa: E402
from train.export import as_stored, save  # noqa: E402
from train.model import Shape, TrainableGptOss  # noqa: E402

PROMPTS = [
    "It was a fine morning, and",
    "And the king said unto",
    "The young lady was",
    "In the days of old there was a man who",
    '"My dear," said',
    "hacker:",
    "HOPE, n.",
    "",
]
PROBE_STEPS = (5, 25)  # throughput is measured between these steps
SAMPLE_WINDOWS = 12  # of the held-out windows, those that tests/test_demo.py evaluates again


@dataclass(frozen=True)
class Recipe:
    """How long and how hard. A batch is `batch` windows of Shape.context tokens."""

    epochs: float = 14
    batch: int = 32
    lr: float = 2e-3
    warmup: float = 0.05
    weight_decay: float = 0.1
    dropout: float = 0.15
    balance: float = 0.01
    clip: float = 1.0
    evaluations: int = 20
    seed: int = 1


RECIPES = {
    "default": Recipe(),
    "long": Recipe(epochs=24, dropout=0.25),
}
QUICK_SHAPE = Shape(vocab=512, hidden=64, intermediate=64, layers=2, heads=2, kv_heads=1, window=16, context=64)


@dataclass
class Result:
    """One recipe's run: the best weights by held-out loss, and how it went."""

    recipe: Recipe
    state: dict[str, Tensor] = field(default_factory=dict)
    best: float = math.inf
    best_step: int = 0
    steps: int = 0
    shortened: bool = False
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """A linear rise, then half a cosine down to zero."""
    warmup = max(1, int(recipe.warmup * steps))
    if step < warmup:
        return recipe.lr * (step + 1) / warmup
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def make_optimizer(model: TrainableGptOss, recipe: Recipe, device: torch.device) -> torch.optim.AdamW:
    """AdamW; only matrices decay."""
    named = dict(model.named_parameters())
    matrices = [p for name, p in named.items() if p.dim() > 1 and not name.endswith("bias")]
    others = [p for name, p in named.items() if p.dim() == 1 or name.endswith("bias")]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95), fused=device.type == "cuda")


@torch.no_grad()
def held_out_loss(model: TrainableGptOss, windows: Tensor, autocast: bool) -> tuple[float, Tensor]:
    """Nats per token over windows [B, S+1], and the share of choices that each expert got, [layers, E]."""
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    total, counts = 0.0, []
    for window_BS in windows.split(16):
        window_BS = window_BS.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            logits, _, count = model(window_BS[:, :-1])
        total += F.cross_entropy(logits.float().flatten(0, 1), window_BS[:, 1:].flatten(), reduction="sum").item()
        counts.append(count)
    model.train(was_training)
    count = torch.stack(counts).sum(0)
    return total / windows[:, 1:].numel(), count / count.sum(-1, keepdim=True)


def train(recipe: Recipe, shape: Shape, documents: list[Tensor], held_out: Tensor, out: Path, args: argparse.Namespace,
          limit_s: float, tokenizer: Tokenizer, to_beat: float) -> Result:  # fmt: skip
    """Train one recipe; writes a checkpoint at each evaluation that is better than `to_beat` and its own best."""
    device = torch.device(args.device)
    torch.manual_seed(recipe.seed)
    rng = random.Random(recipe.seed)
    model = TrainableGptOss(shape, recipe.dropout).to(device)
    optimizer = make_optimizer(model, recipe, device)
    windows = data.epoch(documents, shape.context, rng)
    result = Result(recipe, steps=args.steps or int(recipe.epochs * len(windows) / recipe.batch))
    every = max(1, result.steps // recipe.evaluations)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {len(windows)} windows an epoch, {result.steps} steps: {recipe}", flush=True)
    start, at, running, probe = time.perf_counter(), 0, [], 0.0
    step = 0
    while step < result.steps:
        if at + recipe.batch > len(windows):
            windows, at = data.epoch(documents, shape.context, rng), 0
        batch_BS = windows[at : at + recipe.batch].to(device)
        at += recipe.batch
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step, result.steps)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits, balance, _ = model(batch_BS[:, :-1])
            loss = F.cross_entropy(logits.float().flatten(0, 1), batch_BS[:, 1:].flatten())
        (loss + recipe.balance * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running.append(torch.stack((loss.detach(), balance.detach())))
        step += 1
        if step in PROBE_STEPS:
            running[-1].tolist()  # waits for the device
            if step == PROBE_STEPS[0]:
                probe = time.perf_counter()
            else:
                step_s = (time.perf_counter() - probe) / (PROBE_STEPS[1] - PROBE_STEPS[0])
                fits = step + int(max(0.0, limit_s - (time.perf_counter() - start)) / (step_s * 1.1))
                print(f"probe: {step_s * 1e3:.1f} ms a step, {batch_BS[:, 1:].numel() / step_s:,.0f} tokens/s, "
                      f"{result.steps * step_s:.0f} s expected, memory {_memory(device)}", flush=True)  # fmt: skip
                if fits < result.steps:
                    print(f"shortened to {fits} steps, which fit into {limit_s:.0f} s", flush=True)
                    result.steps, result.shortened = fits, True
                    every = max(1, result.steps // recipe.evaluations)
        if step % every == 0 or step == result.steps:
            mean, running = torch.stack(running).mean(0).tolist(), []
            loss_held_out, share = held_out_loss(model, held_out, device.type == "cuda")
            seconds = time.perf_counter() - start
            result.tokens_per_second = step * batch_BS[:, 1:].numel() / seconds
            result.curve.append({"step": step, "train": round(mean[0], 4), "held_out": round(loss_held_out, 4)})
            print(f"step {step}/{result.steps} train {mean[0]:.4f} held-out {loss_held_out:.4f} balance {mean[1]:.3f} "
                  f"least used expert {share.min().item():.2%} {result.tokens_per_second:,.0f} tokens/s {seconds:.0f} s",
                  flush=True)  # fmt: skip
            if not math.isfinite(mean[0]):
                print("the loss is not finite: this recipe ends here", flush=True)
                break
            if loss_held_out < result.best:
                result.best, result.best_step = loss_held_out, step
                result.state = {name: value.detach().clone() for name, value in model.state_dict().items()}
                if loss_held_out < to_beat:
                    save(out, result.state, shape, tokenizer)
            elif loss_held_out > result.best + args.patience:
                print("held-out loss rises: stopped early", flush=True)
                break
    result.seconds = time.perf_counter() - start
    return result


def _memory(device: torch.device) -> str:
    return f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if device.type == "cuda" else "not measured"


@torch.no_grad()
def sample(model: TrainableGptOss, tokenizer: Tokenizer, prompts: list[str], new_tokens: int, seed: int) -> list[str]:
    """Continue each prompt, temperature 0.8, without a cache; no sample ends early (END is never chosen)."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    texts = []
    prompt_ids = [[tokenizer.token_to_id(data.START), *tokenizer.encode(prompt).ids] for prompt in prompts]
    for ids in prompt_ids:
        chosen = torch.tensor(ids)[None]
        for _ in range(new_tokens):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = model(chosen[:, -model.shape.context :].to(device))[0][:, -1].float().cpu()
            logits[:, :2] = -math.inf
            chosen = torch.cat((chosen, torch.multinomial((logits / 0.8).softmax(-1), 1, generator=generator)), 1)
        texts.append(tokenizer.decode(chosen[0, len(ids) :].tolist()))
    return texts


def report(best: Result, shape: Shape, tokenizer: Tokenizer, held_out: Tensor, args: argparse.Namespace) -> dict:
    """Evaluate the stored values in float32, sample, check."""
    device = torch.device(args.device)
    model = TrainableGptOss(shape).to(device).eval()
    losses, sample_losses = {}, {}
    few = data.held_out_windows(tokenizer, shape.context, SAMPLE_WINDOWS)
    share = torch.empty(0)
    for experts in ("bf16", "mxfp4"):
        model.load_state_dict(as_stored(best.state, experts))
        model.read_experts_as("bf16")  # the values are already what a reader sees
        losses[experts], share = held_out_loss(model, held_out, autocast=False)
        sample_losses[experts], _ = held_out_loss(model, few, autocast=False)
    text_bytes = sum(len(tokenizer.decode(window[1:].tolist()).encode()) for window in held_out)
    bits = {name: loss * held_out[:, 1:].numel() / text_bytes / math.log(2) for name, loss in losses.items()}
    new_tokens = 24 if args.quick else 320
    samples = sample(model, tokenizer, PROMPTS, new_tokens, seed=0)
    check = data.TextCheck()
    first_200 = [" ".join(data.words(text)[:200]) for text in samples]
    checks = [{"words": len(text.split()), "known": round(check.known(text), 4), "longest_copy": check.longest_copy(text)}
              for text in first_200]  # fmt: skip
    for prompt, text, found in zip(PROMPTS, samples, checks, strict=True):
        print(f"\n--- {found}\n[{prompt}]{text}")
    passed = all(found["known"] >= 0.9 and found["longest_copy"] <= 12 for found in checks)
    print(f"\ncheck of each sample's first 200 words (90 % in the corpus, no copied run over 12 words): "
          f"{'passed' if passed else 'NOT passed'}")  # fmt: skip
    return {
        "held_out_nats_per_token": losses,
        "held_out_bits_per_byte": bits,
        "held_out_tokens": held_out[:, 1:].numel(),
        "held_out_sample": {"windows": len(few), "context": shape.context, "nats_per_token": sample_losses},
        "expert_share": {"least": share.min().item(), "most": share.max().item()},
        "checks": checks,
        "samples": [{"prompt": prompt, "text": text} for prompt, text in zip(PROMPTS, samples, strict=True)],
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipe", nargs="+", choices=RECIPES, default=["default"], help="the best on held-out text stays")
    parser.add_argument("--limit", type=float, default=400, help="seconds that training may take, all recipes together")
    parser.add_argument("--patience", type=float, default=0.05, help="stop when the held-out loss is this much over its best")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="a tiny model and 30 steps")
    parser.add_argument("--steps", type=int, default=0, help="instead of the recipe's epochs")
    for name in ("vocab", "hidden", "intermediate", "layers", "experts", "heads", "kv-heads", "context", "window"):
        parser.add_argument(f"--{name}", type=int, help="of the model's shape")
    for name, kind in {"batch": int, "lr": float, "dropout": float, "epochs": float}.items():
        parser.add_argument(f"--{name}", type=kind, help="instead of the recipe's")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.batch = args.steps or 30, args.batch or 4
    return args


def main() -> None:
    args, begin = parse(), time.perf_counter()
    chosen = vars(args)
    shape = replace(QUICK_SHAPE if args.quick else Shape(),
                    **{name: chosen[name] for name in asdict(Shape()) if chosen.get(name)})  # fmt: skip
    override = {name: chosen[name] for name in ("batch", "lr", "dropout", "epochs") if chosen[name] is not None}
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}", flush=True)
    train_text, _ = data.split(data.read_corpus())
    tokenizer = data.train_tokenizer(train_text, shape.vocab)
    documents = data.encode(tokenizer, train_text)
    held_out = data.held_out_windows(tokenizer, shape.context, 8 if args.quick else None)
    tokens = sum(map(len, documents))
    print(f"{tokens:,} training tokens, {held_out[:, 1:].numel():,} held-out, {time.perf_counter() - begin:.0f} s", flush=True)
    results: list[Result] = []
    for index, key in enumerate(args.recipe):
        left = args.limit - sum(result.seconds for result in results)
        to_beat = min((result.best for result in results), default=math.inf)
        results.append(train(replace(RECIPES[key], **override), shape, documents, held_out, args.out, args,
                             left / (len(args.recipe) - index), tokenizer, to_beat))  # fmt: skip
    best = min(results, key=lambda result: result.best)
    size = save(args.out, best.state, shape, tokenizer)
    record = {
        "device": name,
        "torch": torch.__version__,
        "shape": asdict(shape),
        "bytes": size,
        "training_tokens": tokens,
        "runs": [{"recipe": asdict(r.recipe), "steps": r.steps, "shortened": r.shortened, "seconds": round(r.seconds, 1),
                  "tokens_per_second": round(r.tokens_per_second), "best_held_out": r.best, "best_step": r.best_step,
                  "curve": r.curve, "kept": r is best} for r in results],
        **report(best, shape, tokenizer, held_out, args),
        "seconds": round(time.perf_counter() - begin, 1),
    }  # fmt: skip
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"{size:,} bytes in {args.out}; held-out nats per token {record['held_out_nats_per_token']}, bits per byte "
          f"{record['held_out_bits_per_byte']}; {record['seconds']} s in all", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
