"""Trains the embedded model: gpt-oss in small, on public-domain English, its experts through MXFP4.

    python3 scripts/train_demo.py --out epmoe/demo             # one GPU, a few minutes
    python3 scripts/train_demo.py --out /tmp/demo --quick      # the whole path in seconds on a CPU; writes nonsense

The directory gets a complete checkpoint at every evaluation that is the best so far, so that a run that is cut leaves
one, and at the end training.json: settings, times, the held-out losses with bf16 and with MXFP4 experts, samples and
their checks. The epochs fix the number of steps; only where a step is so slow that they would not fit into --seconds
seconds is the schedule shortened, which the log and training.json say.
"""

import argparse
import json
import math
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a training machine needs no installation of epmoe

from scripts.train import data
from scripts.train.export import as_stored, save
from scripts.train.loop import RECIPES, Result, held_out_loss, train
from scripts.train.model import Shape, TrainableGptOss

PROMPTS = (
    "It was a fine morning, and",
    "And the king said unto",
    "The young lady was",
    "In the days of old there was a man who",
    '"My dear," said',
    "hacker:",
    "HOPE, n.",
    "",
)
SAMPLE_WINDOWS = 8  # of the held-out windows, those that tests/demo/test_demo.py evaluates again
QUICK_SHAPE = Shape(vocab=512, hidden=64, intermediate=64, layers=2, heads=2, kv_heads=1, window=16, context=64)
QUICK_STEPS, QUICK_BATCH, QUICK_SHARE = 30, 4, 20


@torch.no_grad()
def sample(model: TrainableGptOss, tokenizer: Tokenizer, prompt: str, new_tokens: int) -> str:
    """Continue a prompt at temperature 0.8, without a cache. START and END are never chosen, so none ends early."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor(tokenizer.encode(prompt).ids)[None]
    given = ids.shape[1]
    for _ in range(new_tokens):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(ids[:, -model.shape.context :].to(device))[0][:, -1].float().cpu()
        logits[:, data.special_ids(tokenizer)] = -math.inf
        ids = torch.cat((ids, torch.multinomial((logits / 0.8).softmax(-1), 1, generator=generator)), 1)
    return tokenizer.decode(ids[0, given:].tolist())


def losses(
    model: TrainableGptOss, state: dict[str, Tensor], tokenizer: Tokenizer, held_out_BS: Tensor
) -> dict[str, Any]:
    """Held-out losses of the stored values, in float32, with bf16 and with MXFP4 experts; `model` keeps the latter."""
    sample_BS = data.held_out_windows(tokenizer, model.shape.context, SAMPLE_WINDOWS)
    text_bytes = sum(len(tokenizer.decode(window_S[1:].tolist()).encode()) for window_S in held_out_BS)
    tokens = held_out_BS[:, 1:].numel()
    nats, bits, of_sample, share = {}, {}, {}, torch.empty(0)
    model.read_experts_as("bf16")  # the state already holds the values that a reader of MXFP4 sees
    for experts in ("bf16", "mxfp4"):
        model.load_state_dict(as_stored(state, experts))
        nats[experts], share = held_out_loss(model, held_out_BS, autocast=False)
        bits[experts] = nats[experts] * tokens / text_bytes / math.log(2)
        of_sample[experts], _ = held_out_loss(model, sample_BS, autocast=False)
    return {
        "held_out": {"tokens": tokens, "nats_per_token": nats, "bits_per_byte": bits},
        "held_out_sample": {"windows": len(sample_BS), "context": model.shape.context, "nats_per_token": of_sample},
        "expert_share": {"least": share.min().item(), "most": share.max().item()},
    }


def samples(model: TrainableGptOss, tokenizer: Tokenizer, new_tokens: int) -> list[dict[str, Any]]:
    """Continuations of PROMPTS, each with the checks of its first 200 words; prints them."""
    check, found = data.TextCheck(), []
    for prompt in PROMPTS:
        text = sample(model, tokenizer, prompt, new_tokens)
        counted = " ".join(data.words(text)[:200])
        known, copied = check.known(counted), check.longest_copy(counted)
        found.append({"prompt": prompt, "text": text, "known": known, "longest_copy": copied})
        print(f"\n--- {known:.1%} of the words are in the corpus, longest copied run {copied} words\n[{prompt}]{text}")
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--recipe", nargs="+", choices=RECIPES, default=["default"], help="several: the best one is kept"
    )
    parser.add_argument("--seconds", type=float, default=400, help="seconds of training, all recipes together")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--quick", action="store_true", help=f"a tiny model, {QUICK_STEPS} steps, a {QUICK_SHARE}th of the corpus"
    )
    parser.add_argument("--steps", type=int, help="instead of the recipe's epochs")
    for name in ("vocab", "hidden", "intermediate", "layers", "experts", "heads", "kv-heads", "context", "window"):
        parser.add_argument(f"--{name}", type=int, help="of the model's shape")
    for name, kind in {"batch": int, "lr": float, "dropout": float, "epochs": float}.items():
        parser.add_argument(f"--{name}", type=kind, help="instead of the recipe's")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.batch = args.steps or QUICK_STEPS, args.batch or QUICK_BATCH
    return args


def run_recipes(
    args: argparse.Namespace, shape: Shape, tokenizer: Tokenizer, documents: list[Tensor], held_out_BS: Tensor
) -> list[Result]:
    """Each recipe in turn, with an even share of the time that is left; args.out holds the best so far."""
    override = {key: vars(args)[key] for key in ("batch", "lr", "dropout", "epochs") if vars(args)[key] is not None}
    results: list[Result] = []

    def on_best(result: Result) -> None:
        if all(result.best < other.best for other in results):
            save(args.out, result.state, shape, tokenizer)

    for index, key in enumerate(args.recipe):
        left_s = (args.seconds - sum(result.seconds for result in results)) / (len(args.recipe) - index)
        recipe = replace(RECIPES[key], **override)
        device = torch.device(args.device)
        result = train(recipe, shape, documents, held_out_BS, device, steps=args.steps, limit_s=left_s, on_best=on_best)
        results.append(result)
    return results


def main() -> None:
    begin, args = time.perf_counter(), parse()
    given = {key: vars(args)[key] for key in asdict(Shape()) if vars(args).get(key)}
    shape = replace(QUICK_SHAPE if args.quick else Shape(), **given)
    device_name = torch.cuda.get_device_name() if args.device.startswith("cuda") else "CPU"
    print(f"{device_name}, torch {torch.__version__}", flush=True)
    train_text = data.split(data.read_corpus())[0][:: QUICK_SHARE if args.quick else 1]
    tokenizer = data.train_tokenizer(train_text, shape.vocab)
    documents = data.encode(tokenizer, train_text)
    held_out_BS = data.held_out_windows(tokenizer, shape.context, 8 if args.quick else None)
    tokens = sum(map(len, documents))
    print(f"{tokens:,} training tokens, {held_out_BS[:, 1:].numel():,} held out", flush=True)

    results = run_recipes(args, shape, tokenizer, documents, held_out_BS)
    best = min(results, key=lambda result: result.best)
    model = TrainableGptOss(shape).to(args.device).eval()
    record = {
        "device": device_name,
        "torch": torch.__version__,
        "shape": asdict(shape),
        "training_tokens": tokens,
        "bytes": save(args.out, best.state, shape, tokenizer),
        **losses(model, best.state, tokenizer, held_out_BS),
        "kept": results.index(best),
        "runs": [result.summary() for result in results],
        "samples": samples(model, tokenizer, 24 if args.quick else 320),
    }
    record["seconds"] = round(time.perf_counter() - begin, 1)
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    passed = all(found["known"] >= 0.9 and found["longest_copy"] <= 12 for found in record["samples"])
    print(
        f"\nsamples {'pass' if passed else 'do NOT pass'}: 90 % of the words in the corpus, no copied run over 12 words"
    )
    print(f"{record['bytes']:,} bytes in {args.out}, recipe {record['kept']} kept, {record['seconds']} s in all")
    print(json.dumps({key: record[key] for key in ("held_out", "held_out_sample", "expert_share")}), flush=True)


if __name__ == "__main__":
    main()
