"""experts_implementation="epmoe": any module's own weights, in any dtype."""

import pytest
import torch
from moe_families import IDS, logits, make

from epmoe.errors import UserError
from epmoe.integrations.transformers.experts import epmoe_experts, plain_rows, slot_rows


def test_it_is_what_the_model_runs() -> None:
    """A model can be switched to it and back."""
    model = make("qwen3_moe")
    model.set_experts_implementation("eager")
    expected = logits(model)
    model.set_experts_implementation("epmoe")
    found = logits(model)
    assert not torch.equal(found, expected), "another order of sums shows somewhere"
    assert (found - expected).abs().max() < 1e-5 * expected.std()  # float32, two layers
    model.set_experts_implementation("eager")
    assert torch.equal(logits(model), expected)


def test_bfloat16() -> None:
    """Products and sums are in float32: nearer to the float32 model than the library's own in bfloat16."""
    expected = logits(make("mixtral"))
    model = make("mixtral").to(torch.bfloat16)
    errors = {}
    for name in ("epmoe", "eager"):
        model.set_experts_implementation(name)
        errors[name] = float((logits(model) - expected).abs().max() / expected.std())
    assert errors["epmoe"] < 0.2  # two layers of attention and norms in bfloat16


def test_rows_are_those_of_the_library_one_by_one() -> None:
    torch.manual_seed(0)
    experts = make("glm4_moe").model.layers[1].mlp.experts
    experts.config._experts_implementation = "eager"
    x_TH, weight_TK = torch.randn(5, 64), torch.rand(5, 3)
    index_TK = torch.rand(5, 6).argsort(1)[:, :3]
    index_TK[2, 1] = 6  # another rank's
    rows_TKH = plain_rows(experts, x_TH, index_TK, weight_TK)
    torch.testing.assert_close(rows_TKH, slot_rows(experts, x_TH, index_TK, weight_TK), rtol=1e-5, atol=1e-6)
    assert not rows_TKH[2, 1].any() and rows_TKH[2, 0].any()
    for token in range(5):  # the same bits in a batch of one
        row = slice(token, token + 1)
        assert torch.equal(plain_rows(experts, x_TH[row], index_TK[row], weight_TK[row]), rows_TKH[row])


def test_no_tokens() -> None:
    experts = make("olmoe").model.layers[0].mlp.experts
    index_TK, weight_TK = torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, 3)
    assert epmoe_experts(experts, torch.zeros(0, 64), index_TK, weight_TK).shape == (0, 64)


def test_a_backward_pass_is_refused() -> None:
    model = make("olmoe").requires_grad_(True)
    model.set_experts_implementation("epmoe")
    loss = model(IDS, labels=IDS).loss  # a forward alone needs no torch.no_grad()
    with pytest.raises(UserError, match=r"no gradients: run the model under torch.no_grad"):
        loss.backward()


def test_a_class_that_does_not_fit() -> None:
    model = make("qwen3_moe", hidden_act="gelu")
    model.set_experts_implementation("epmoe")
    with pytest.raises(UserError, match=r"experts_implementation=epmoe: Qwen3MoeExperts has a gate .*: choose another"):
        logits(model)


def test_weights_may_change_under_it() -> None:
    """Nothing of them is kept."""
    model = make("olmoe")
    model.set_experts_implementation("epmoe")
    first = logits(model)
    model.model.layers[0].mlp.experts.down_proj.data.mul_(2)
    assert not torch.equal(logits(model), first)
