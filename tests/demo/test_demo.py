"""The embedded model: that it is small, complete, as good as recorded on any number of ranks, and writes English.

And the code that trained it: that its forward pass is epmoe's, and that the checks of its text can fail.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from spawn import run_ranks
from torch import Tensor

from epmoe.batch import Step
from epmoe.cache.cache import Cache, CacheConfig
from epmoe.formats.mxfp4 import decode, encode
from epmoe.ranks.mesh import Ranks
from epmoe.text.tokenizer import Tokenizer
from epmoe.weights.checkpoint import Checkpoint
from epmoe.weights.choices import Choices
from epmoe.weights.load import load
from scripts.train import data, evaluate
from scripts.train.export import as_stored, save
from scripts.train.model import Experts, Shape, TrainableGptOss, fake_mxfp4

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "epmoe" / "demo"
TINY = Shape(
    vocab=512, hidden=64, intermediate=96, layers=2, experts=16, heads=4, kv_heads=2, head_dim=16, window=8, context=48
)


@pytest.fixture(scope="module")
def record() -> dict:
    return json.loads((DEMO / "training.json").read_text())


@pytest.fixture(scope="module")
def check() -> data.TextCheck:
    return data.TextCheck()


def test_the_shipped_directory_is_small_and_complete() -> None:
    """At most 16 MB, every file of a published checkpoint, and the architecture that is promised."""
    files = {file.name: file.stat().st_size for file in DEMO.iterdir() if file.is_file()}
    assert sum(files.values()) <= 16_000_000
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
            "chat_template.jinja", "training.json"} == files.keys()  # fmt: skip
    config = json.loads((DEMO / "config.json").read_text())
    assert config["num_local_experts"] >= 16 and config["num_experts_per_tok"] == 4
    assert set(config["layer_types"]) == {"sliding_attention", "full_attention"}
    assert config["rope_scaling"]["factor"] > 1 and config["rope_scaling"]["truncate"] is False
    assert config["quantization_config"]["quant_method"] == "mxfp4"


def held_out(ranks: Ranks) -> tuple[float, Tensor]:
    return evaluate.held_out_loss(ranks, DEMO, evaluate.sample_windows(DEMO))


@pytest.mark.parametrize("sizes", [(2,), pytest.param((1, 2, 4), marks=pytest.mark.slow)], ids=str)
def test_held_out_loss_is_the_recorded_one_with_the_same_bits(record: dict, sizes: tuple[int, ...]) -> None:
    """The recorded figure is what was trained, the loaded model is as good, and the ranks change nothing.

    Training recorded the loss of its own forward pass, on a GPU: 4096 tokens summed in float32, whose numbers are 2^-10
    apart there, so 2.4e-7 a token; here it comes out within 1.2e-7. On another CPU, where two experts nearly tie, a
    token may go to the other one: that moves its own loss by some 0.1 and the mean by 2e-5. Hence 1e-4, a few of those.
    """
    results = {size: run_ranks(held_out, size) for size in sizes}
    losses = {loss for ranks in results.values() for loss, _ in ranks}
    assert len(losses) == 1, losses
    assert losses.pop() == pytest.approx(record["held_out_sample"]["nats_per_token"]["mxfp4"], rel=0, abs=1e-4)
    choices = results[sizes[0]][0][1]
    assert choices.min() > 0, f"experts that no token chose: {(choices == 0).nonzero().tolist()}"


def test_both_held_out_losses_are_recorded(record: dict) -> None:
    """bf16 and MXFP4 experts; the model learned with MXFP4's values, so they may cost it hardly anything."""
    losses = record["held_out"]["nats_per_token"]
    assert losses["mxfp4"] <= losses["bf16"] + 0.05
    assert record["held_out"]["tokens"] > 50_000


def test_two_ranks_write_recognisable_english(check: data.TextCheck) -> None:
    """What scripts/demo runs: of 200 sampled words 90 % are words of the corpus, no run of more than 12 is a copy."""
    command = [str(ROOT / "scripts" / "demo"), "sampling.ignore_eos=true", "max_new_tokens=90", "sampling.n=4"]
    environment = {**os.environ, "EPMOE_PYTHON": sys.executable}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    words = data.words(done.stdout)
    assert len(words) >= 200, done.stdout
    text = " ".join(words[:200])
    assert check.known(text) >= 0.9, text
    assert check.longest_copy(text) <= 12, text


def test_the_chat_template_continues_plain_text() -> None:
    tokenizer = Tokenizer.of(Checkpoint.open(DEMO))
    assert tokenizer.chat is not None
    messages = [{"role": "system", "content": "One."}, {"role": "user", "content": "Two, and"}]
    assert tokenizer.chat.render(messages) == "<|startoftext|>One.\n\nTwo, and"
    assert tokenizer.encode("Two", special=True)[0] == tokenizer.encode("<|startoftext|>Two", special=False)[0]


def test_the_checks_of_text_can_fail(check: data.TextCheck) -> None:
    copied = " ".join(data.words(data.read_corpus()[0])[100:113])
    assert check.longest_copy(f"zzz {copied} zzz") == 13 and check.known(f"zzz {copied} zzz") == pytest.approx(13 / 15)
    assert check.longest_copy("thouhe himreveic thouem") == 0


def test_the_held_out_text_is_fixed_and_not_trained_on() -> None:
    train, held = data.split(data.read_corpus())
    assert len(held) == 147 and 0.015 < sum(map(len, held)) / sum(map(len, train)) < 0.025
    assert not any(len(chunk) > 500 and chunk in text for chunk in held[::10] for text in train)


@pytest.fixture
def tiny(tmp_path: Path) -> TrainableGptOss:
    """A tiny model whose every parameter matters, saved in tmp_path; what is returned holds the stored values."""
    torch.manual_seed(0)
    model = TrainableGptOss(TINY).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(2.0).add_(torch.randn_like(parameter), alpha=0.1)
            if name.endswith(("bias", "sinks")):
                parameter.normal_()
    save(tmp_path, model.state_dict(), TINY, data.train_tokenizer(data.read_corpus()[:100], TINY.vocab))
    model.load_state_dict(as_stored(model.state_dict(), "mxfp4"))
    return model


def epmoe_logits(ranks: Ranks, directory: Path, token_S: Tensor) -> Tensor:
    model, _ = load(Checkpoint.open(directory), ranks, Choices(dtype="float32"), progress=False)
    config, index = model.config, torch.arange(len(token_S))
    cache = Cache(CacheConfig(config.windows, config.kv_heads, config.head_dim, tokens=len(token_S), sequences=1,
                  dtype=torch.float32), ranks.device)  # fmt: skip
    spans = ((0, len(token_S), 0, cache.admit(len(token_S))),)
    step = Step(token_S, index, index[:0], spans=spans, output_O=index)
    with torch.inference_mode():
        return model(step, cache).clone()


def test_the_trained_function_is_epmoes(tiny: TrainableGptOss, tmp_path: Path) -> None:
    """Training's forward pass, exported and loaded, gives epmoe's logits; float32 sums in another order, hence 1e-4."""
    token_S = torch.randint(0, TINY.vocab, (TINY.context,))
    with torch.no_grad():
        expected_SV = tiny(token_S[None])[0][0]
    (found_SV,) = run_ranks(epmoe_logits, 1, tmp_path, token_S)
    assert expected_SV.std() > 0.3
    torch.testing.assert_close(found_SV, expected_SV, atol=1e-4, rtol=1e-4)


def test_dense_experts_are_the_routed_ones() -> None:
    """On a GPU training runs every expert on every token; that is the same sum."""
    torch.manual_seed(0)
    experts = Experts(TINY)
    torch.nn.init.normal_(experts.gate_up_proj_bias)
    torch.nn.init.normal_(experts.down_proj_bias)
    x_TH, weight_TE = torch.randn(40, TINY.hidden), torch.zeros(40, TINY.experts)
    weight_TE.scatter_(1, torch.rand(40, TINY.experts).topk(4).indices, torch.rand(40, 4))
    matrices = experts.gate_up_proj, experts.down_proj
    torch.testing.assert_close(
        experts._dense(x_TH, weight_TE, *matrices), experts._routed(x_TH, weight_TE, *matrices), atol=1e-4, rtol=1e-4
    )


def test_fake_quantisation_gives_stored_values_and_a_straight_gradient() -> None:
    weight = torch.randn(3, 8, 64, requires_grad=True)
    value = fake_mxfp4(weight)
    assert torch.equal(value.detach(), decode(*encode(weight.detach()), torch.float32))
    value.backward(torch.arange(value.numel()).view_as(value).float())
    assert weight.grad is not None and torch.equal(weight.grad.flatten(), torch.arange(weight.numel()).float())


def test_the_training_script_makes_a_checkpoint(tmp_path: Path) -> None:
    """The whole path of scripts/train_demo.py in seconds; the loss falls."""
    command = [sys.executable, str(ROOT / "scripts" / "train_demo.py"), "--out", str(tmp_path), "--quick"]
    done = subprocess.run([*command, "--device", "cpu"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    run = json.loads((tmp_path / "training.json").read_text())["runs"][0]
    assert run["curve"][-1]["held_out"] < run["curve"][0]["held_out"] - 0.3
    assert Checkpoint.open(tmp_path).config["model_type"] == "gpt_oss"
