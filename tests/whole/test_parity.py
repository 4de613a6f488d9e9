"""Parity with transformers' GptOssForCausalLM, and proof that the check sees every mistake that it is there for.

Letters: T tokens · E experts · K experts per token · L experts on this rank · H hidden · N output rows of a matrix.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from loading import rewrite_tensors
from oracle import Parity, Trace, compare, load_oracle, load_ours, sharpen, trace_oracle, trace_ours

from epmoe.formats.mxfp4 import Mxfp4Matrix
from epmoe.layers import attention, rotary
from epmoe.layers.rotary import Rotary
from epmoe.models.decoder import DecoderConfig
from epmoe.models.gpt_oss import GptOss
from epmoe.moe.experts import reference as reference_experts
from epmoe.moe.router import Dispatch
from epmoe.moe.router import reference as reference_router
from epmoe.weights.synthetic import make_checkpoint

# Both sides compute in float32 and differ in the order of their sums only: a few units of 2^-24 = 6e-8 in each sum, and
# some more where a softmax turns a score's absolute error into a relative one of its weight. Measured relative to the
# RMS of the logits: RMS 0.8e-7 to 1.3e-7, maximum 0.5e-6 to 2.6e-6 over some 100,000 logits. The bounds leave a factor
# of 4 for other processors' orders of summation; the mildest mutation below is beyond them by a factor of 1,000.
MAX_ERROR, RMS_ERROR = 1e-5, 5e-7
LENGTHS = (100, 3, 29)  # beyond window and YaRN's original length (64); shorter than the window; beyond the window
NEW = 64


@dataclass(frozen=True)
class Case:
    name: str
    overrides: Mapping[str, Any] = field(default_factory=dict)


CASES = [
    Case("tiny"),
    Case(
        "top-k of all experts, odd heads, odd half of a head",
        {"hidden": 32, "intermediate": 96, "experts": 3, "top_k": 3, "heads": 3, "kv_heads": 3, "head_dim": 10}
        | {"layers": 3, "window": 5, "vocab": 77},
    ),
    Case(
        "one key/value head, rope_parameters, truncate",
        {"hidden": 160, "heads": 6, "kv_heads": 1, "head_dim": 8, "experts": 9, "top_k": 4, "window": 17}
        | {"truncate": True, "rope_spelling": "parameters"},
    ),
    # A window of one is correct here too (test_attention.py), but the oracle's cache then keeps every position.
    Case("tied, no attention biases, window of two", {"tied": True, "attention_bias": False, "window": 2}),
    Case(
        "bf16 experts, top-1, clamps that bite, window beyond the prompts",
        {"dtype_experts": "bf16", "experts": 4, "top_k": 1, "swiglu_limit": 0.1, "window": 300},
    ),
]


@dataclass(frozen=True)
class Pair:
    """The two models of one checkpoint, and what the oracle says to the prompts."""

    path: Path
    oracle: Any
    ours: GptOss
    prompts: list[tuple[int, ...]]
    expected: list[Trace]

    def check(self, chunk: int = 1000) -> Parity:
        """The parity check: greedy tokens and all logits on the way, prompts in chunks of `chunk`."""
        return compare(trace_ours(self.ours, self.prompts, NEW, chunk=chunk), self.expected)


def make_pair(path: Path, change: Callable[[dict[str, torch.Tensor]], None] = sharpen, **overrides: Any) -> Pair:
    make_checkpoint(path, norm_std=0.3, **overrides)
    rewrite_tensors(path, change)
    oracle, ours = load_oracle(path), load_ours(path, dtype="float32", experts="reference")
    generator = torch.Generator().manual_seed(0)
    vocab = ours.config.vocab
    prompts = [tuple(torch.randint(vocab, (length,), generator=generator).tolist()) for length in LENGTHS]
    return Pair(path, oracle, ours, prompts, [trace_oracle(oracle, prompt, NEW) for prompt in prompts])


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("parity"), **request.param.overrides)


@pytest.mark.parametrize("chunk", [1000, 7], ids=["whole prompts", "chunks of 7"])
def test_parity(pair: Pair, chunk: int, record_property: Callable[[str, object], None]) -> None:
    """Protects the whole forward pass: 64 greedy tokens equal, every logit within rounding, three prompts a batch."""
    parity = pair.check(chunk)
    record_property("max_error", parity.max_error)
    record_property("rms_error", parity.rms_error)
    print(f"relative to the logits' RMS: maximum error {parity.max_error:.2e}, RMS error {parity.rms_error:.2e}")
    assert not parity.failures(MAX_ERROR, RMS_ERROR)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("tiny"))


def test_the_oracle_is_exact(tiny: Pair) -> None:
    """Protects the comparison: the oracle runs in float32 on the very numbers that the bytes stand for."""
    layer = tiny.oracle.model.layers[0].mlp
    matrix = reference_of(tiny.ours, 0).weights.gate_up
    assert isinstance(matrix, Mxfp4Matrix)
    assert layer.experts.gate_up_proj.dtype == torch.float32
    assert torch.equal(layer.experts.gate_up_proj.mT, matrix.dequantize(torch.float32))
    assert tiny.oracle.config._attn_implementation == "eager"
    assert max(LENGTHS) > tiny.ours.config.rope.original_max_position


def reference_of(model: GptOss, layer: int) -> reference_experts.ReferenceExperts:
    experts = model.moe_layers()[layer].experts
    assert isinstance(experts, reference_experts.ReferenceExperts)
    return experts


# Mutations: each puts one mistake into our side and leaves the rest alone. They patch a module-level function where the
# code has one, so that the mistake sits where a programmer would make it.

Patch = pytest.MonkeyPatch


def change_config(patch: Patch, model: GptOss, change: Callable[[DecoderConfig], DecoderConfig]) -> None:
    patch.setattr(model, "config", change(model.config))
    patch.setattr(model, "rotary", Rotary(model.config.rope))


def swap_gate_and_up(patch: Patch, model: GptOss) -> None:
    real = reference_experts.gated
    patch.setattr(reference_experts, "gated", lambda x_MN, a: real(x_MN.unflatten(1, (-1, 2)).flip(-1).flatten(1), a))


def drop_sink(patch: Patch, model: GptOss) -> None:
    real: Any = attention.attend
    patch.setattr(attention, "attend", lambda *args: real(*args[:-1], torch.full_like(args[-1], -torch.inf)))


def scale_sink(patch: Patch, model: GptOss) -> None:
    real: Any = attention.attend
    scale = model.config.head_dim**-0.5
    patch.setattr(attention, "attend", lambda *args: real(*args[:-1], args[-1] * scale))


def window(by: int) -> Callable[[Patch, GptOss], None]:
    def mutate(patch: Patch, model: GptOss) -> None:
        windows = tuple(None if width is None else width + by for width in model.config.windows)
        change_config(patch, model, lambda config: replace(config, windows=windows))

    return mutate


def truncate(patch: Patch, model: GptOss) -> None:
    change_config(patch, model, lambda config: replace(config, rope=replace(config.rope, truncate=True)))


def drop_concentration(patch: Patch, model: GptOss) -> None:
    change_config(patch, model, lambda config: replace(config, rope=replace(config.rope, concentration=1.0)))


def rotate_neighbours(patch: Patch, model: GptOss) -> None:
    real = rotary.rotate

    def rotate(x_THD: torch.Tensor, *cos_sin: torch.Tensor) -> torch.Tensor:
        paired = x_THD.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        return real(paired, *cos_sin).unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)

    patch.setattr(attention, "rotate", rotate)


def down_bias_after_the_gate_weight(patch: Patch, model: GptOss) -> None:
    for layer in range(model.config.layers):
        experts = reference_of(model, layer)

        def forward(
            x_TH: torch.Tensor, dispatch: Dispatch, y_TKH: Any, experts: Any = experts, real: Any = experts.forward
        ) -> Any:
            bias_TKH = experts.weights.down_bias_LH[dispatch.expert_TK.long()]  # one rank: local ids are global ids
            return real(x_TH, dispatch, y_TKH) + (1 - dispatch.weight_TK[..., None]) * bias_TKH

        patch.setattr(experts, "forward", forward)


def drop_gate_up_bias(patch: Patch, model: GptOss) -> None:
    for layer in range(model.config.layers):
        experts = reference_of(model, layer)
        bias_LN = torch.zeros_like(experts.weights.gate_up_bias_LN)
        patch.setattr(experts, "weights", replace(experts.weights, gate_up_bias_LN=bias_LN))


def softmax_over_all_experts(patch: Patch, model: GptOss) -> None:
    real = reference_router.top_experts

    def top_experts(logits_TE: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
        expert_TK = real(logits_TE, top_k)[0]
        return expert_TK, logits_TE.softmax(-1).gather(1, expert_TK.long())

    patch.setattr(reference_router, "top_experts", top_experts)


def ties_to_the_higher_id(patch: Patch, model: GptOss) -> None:
    real = reference_router.top_experts

    def top_experts(logits_TE: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
        expert_TK, weight_TK = real(logits_TE.flip(-1), top_k)
        return logits_TE.shape[1] - 1 - expert_TK, weight_TK

    patch.setattr(reference_router, "top_experts", top_experts)


MUTATIONS = {
    "gate and up swapped": swap_gate_and_up,
    "gate_up bias dropped": drop_gate_up_bias,
    "down bias after the gate weight": down_bias_after_the_gate_weight,
    "softmax over all experts": softmax_over_all_experts,
    "sink dropped": drop_sink,
    "sink scaled": scale_sink,
    "window + 1": window(+1),
    "window - 1": window(-1),
    "truncate true": truncate,
    "concentration dropped": drop_concentration,
    "neighbours rotated": rotate_neighbours,
}


@pytest.mark.parametrize("mutate", MUTATIONS.values(), ids=list(MUTATIONS))
def test_a_mutation_fails_the_check(tiny: Pair, mutate: Callable[[Patch, GptOss], None], monkeypatch: Patch) -> None:
    """Protects the check's teeth: each of these mistakes, alone, is out of bounds, and far."""
    mutate(monkeypatch, tiny.ours)
    parity = tiny.check()
    print(f"mutated: {parity}")
    assert parity.failures(100 * MAX_ERROR, 100 * RMS_ERROR)


# Ties. torch.topk promises no order among equals: where the tie below decides which of the two experts is chosen, the
# oracle took the lower id 278 times and the higher 59 times. So its router is given the rule itself, written a second
# time: a sort in Python by (-logit, id).

TIED = (1, 3)  # of 5 experts, top-2


def tie(tensors: dict[str, torch.Tensor]) -> None:
    """Two experts whose logits are exactly equal whatever the token: no weights, one bias."""
    sharpen(tensors)
    for name, tensor in tensors.items():
        if "router" in name:
            tensor[list(TIED)] = 0.125 if name.endswith("bias") else 0.0


class LowerId:
    """The oracle's router with ties to the lower id; counts how often the rule decides which expert is chosen."""

    def __init__(self, router: Any) -> None:
        self.router, self.decided = router, 0

    def __call__(self, x_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits_TE = torch.nn.functional.linear(x_TH, self.router.weight, self.router.bias)
        chosen = []
        for row in logits_TE.tolist():
            assert row[TIED[0]] == row[TIED[1]]
            ordered = sorted((-logit, expert) for expert, logit in enumerate(row))
            chosen.append([expert for _, expert in ordered[: self.router.top_k]])
            self.decided += len(set(chosen[-1]) & set(TIED)) == 1
        expert_TK = torch.tensor(chosen)
        return logits_TE, logits_TE.gather(1, expert_TK).softmax(-1), expert_TK


@pytest.fixture
def tied(tmp_path: Path) -> Iterator[tuple[Pair, int]]:
    """A pair whose oracle follows the rule, and how many choices the rule decided."""
    pair = make_pair(tmp_path, tie)
    routers = []
    with pytest.MonkeyPatch.context() as patch:
        for layer in pair.oracle.model.layers:
            routers.append(LowerId(layer.mlp.router))
            patch.setattr(layer.mlp.router, "forward", routers[-1])
        trace_oracle.cache_clear()
        expected = [trace_oracle(pair.oracle, prompt, NEW) for prompt in pair.prompts]
    yield replace(pair, expected=expected), sum(router.decided for router in routers)


def test_ties_go_to_the_lower_id(tied: tuple[Pair, int], monkeypatch: Patch) -> None:
    """Protects the choice among equal logits: ours follows the rule, and the opposite rule fails the same check."""
    pair, decided = tied
    assert decided > 100, "the data must hold choices that the rule decides"
    assert not pair.check().failures(MAX_ERROR, RMS_ERROR)
    ties_to_the_higher_id(monkeypatch, pair.ours)
    assert pair.check().failures(100 * MAX_ERROR, 100 * RMS_ERROR)


# bf16. Rounding at every layer makes the oracle in bf16 differ from the same oracle in float32; that distance is the
# unit. Ours rounds in fewer places (scores, the softmax, rotations, slot sums and logits stay in float32), so it should
# be as near or nearer. The errors are dominated by tokens for which rounding changed a near-tie of the router, and
# those are not the same in the two: a factor of 1.5 on the RMS over all logits, of 2 on the maximum, which one token
# decides.
BF16_RMS, BF16_MAX = 1.5, 2.0
SINGLY = 8  # last tokens of each prompt that ours decodes one by one, in one batch


def compare_bf16(path: Path, device: str, lengths: tuple[int, ...], **names: str) -> tuple[Parity, Parity]:
    """Of ours in bf16 and of the oracle in bf16: their distance from the oracle in float32."""
    ours = load_ours(path, device, dtype="bfloat16", **names)
    generator = torch.Generator().manual_seed(0)
    prompts = [tuple(torch.randint(ours.config.vocab, (length,), generator=generator).tolist()) for length in lengths]
    got = trace_ours(ours, prompts, 0, chunk=256, page=16, singly=SINGLY)
    traces = []
    for dtype in (torch.float32, torch.bfloat16):
        oracle = load_oracle(path, dtype, device)
        traces.append([trace_oracle(oracle, prompt, 0) for prompt in prompts])
        trace_oracle.cache_clear()  # lets the oracle go: 9.6 GB of experts at real sizes
        del oracle
    exact, rounded = traces
    return compare(got, exact), compare(rounded, exact)


def check_bf16(ours: Parity, oracle: Parity, record_property: Callable[[str, object], None]) -> None:
    for side, parity in (("ours", ours), ("oracle", oracle)):
        record_property(f"{side}_bf16_max_error", parity.max_error)
        record_property(f"{side}_bf16_rms_error", parity.rms_error)
        print(f"{side} in bf16 against float32: maximum {parity.max_error:.2e}, RMS {parity.rms_error:.2e}")
    assert oracle.rms_error < 0.1, "the unit itself must be small, or it excuses everything"
    assert not ours.failures(BF16_MAX * oracle.max_error, BF16_RMS * oracle.rms_error)


def test_bfloat16_is_as_near_as_the_oracles(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """Protects the low-precision path on the CPU: no farther from float32 than the oracle's own bf16."""
    make_checkpoint(tmp_path, norm_std=0.3, hidden=128, intermediate=64, experts=8)
    check_bf16(*compare_bf16(tmp_path, "cpu", (90, 20), experts="reference"), record_property)


@pytest.mark.gpu
@pytest.mark.parametrize("experts", ["triton", "reference"])
def test_real_layer_shapes_on_a_gpu(
    experts: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Protects the path that people run: gpt-oss-20b's layers (vocabulary reduced) in bf16 from packed weights."""
    make_checkpoint(tmp_path, "20b", layers=3, vocab=4096, shards=1, norm_std=0.3)
    torch.set_float32_matmul_precision("highest")  # the float32 oracle must not multiply in TF32
    check_bf16(*compare_bf16(tmp_path, "cuda", (700, 17, 150), experts=experts), record_property)
