"""EpmoeConfig: what is loaded, how much of it is in memory, what is left out, what is said."""

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_families import IDS, load, logits, make, saved, stored, tokens
from oracle import load_oracle, load_ours, trace_ours

from epmoe.errors import UserError
from epmoe.integrations.transformers import EpmoeConfig, PackedExperts, quantizer, replace_with_epmoe_experts
from epmoe.weights.synthetic import make_checkpoint


def packed_names(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, PackedExperts)]


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in OpenAI's format."""
    return make_checkpoint(tmp_path_factory.mktemp("oss") / "tiny", size="tiny")


def test_stored_mxfp4_stays_as_stored(gpt_oss: Path, tmp_path: Path) -> None:
    """The same values as transformers' own dequantised model, and the same bytes when saved again."""
    model = load(gpt_oss, quantization_config=EpmoeConfig())
    assert packed_names(model) == [f"model.layers.{i}.mlp.experts" for i in range(model.config.num_hidden_layers)]
    expected = logits(load_oracle(gpt_oss), IDS % 32)
    assert (logits(model, IDS % 32) - expected).abs().max() < 1e-5 * expected.std()
    again, first = stored(saved(model, tmp_path)), stored(gpt_oss)
    experts = [name for name in first if ".experts." in name and first[name].dtype == torch.uint8]
    assert experts and all(torch.equal(again[name], first[name]) for name in experts)
    assert again.keys() == first.keys()
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "mxfp4"
    # without this package's quantiser
    assert (logits(load_oracle(tmp_path), IDS % 32) - expected).abs().max() < 1e-5 * expected.std()


def test_a_gpt_oss_that_was_quantised_runs_in_epmoe(tmp_path: Path) -> None:
    """What is saved is a checkpoint that epmoe's own loader takes."""
    source = saved(make("gpt_oss"), tmp_path / "plain")
    model = load(source, quantization_config=EpmoeConfig())
    folder = saved(model, tmp_path / "mxfp4")
    prompt = IDS[0].tolist()
    expected = model.generate(IDS[:1], attention_mask=torch.ones_like(IDS[:1]), max_new_tokens=4, do_sample=False)
    ((found, _),) = trace_ours(load_ours(folder), [prompt], 4, chunk=len(prompt))
    assert found == expected[0, len(prompt) :].tolist()


def test_one_matrix_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the next matrix is there, the one before has gone, whether the file has it whole or expert by expert."""
    seen: list[Any] = []
    convert = quantizer.Quantize.convert

    def watched(self: Any, input_dict: dict[str, Any], **given: Any) -> dict[str, torch.Tensor]:
        assert all(reference() is None for reference in seen), "a matrix before this one is still in memory"
        (value,) = input_dict.values()
        value = value[0] if isinstance(value, list) else value
        assert value.shape[0] == 6 and value.is_floating_point()
        seen.append(weakref.ref(value.untyped_storage()))
        seen.append(weakref.ref(value))
        return convert(self, input_dict, **given)

    monkeypatch.setattr(quantizer.Quantize, "convert", watched)
    for family in ("gpt_oss", "olmoe"):
        seen.clear()
        model = load(saved(make(family), tmp_path / family), quantization_config=EpmoeConfig())
        assert len(seen) == 2 * 4 and len(packed_names(model)) == 2
        assert not [name for name, _ in model.named_parameters() if name.endswith(("gate_up_proj", "down_proj"))]


def test_modules_to_not_convert(tmp_path: Path) -> None:
    model = load(
        saved(make("olmoe"), tmp_path / "plain"),
        quantization_config=EpmoeConfig(modules_to_not_convert=["model.layers.0"]),
    )
    assert packed_names(model) == ["model.layers.1.mlp.experts"]
    folder = saved(model, tmp_path / "saved")
    names = stored(folder).keys()
    assert "model.layers.0.mlp.experts.5.gate_proj.weight" in names  # as the family's checkpoints have them
    assert "model.layers.1.mlp.experts.gate_up_proj_blocks" in names
    again = load(folder)  # config.json says which
    assert packed_names(again) == ["model.layers.1.mlp.experts"] and torch.equal(logits(again), logits(model))
    with pytest.raises(UserError, match=r"keeps model.layers.1.mlp.experts, which this checkpoint stores in MXFP4"):
        load(folder, quantization_config=EpmoeConfig(modules_to_not_convert=["model.layers.1"]))


@pytest.mark.parametrize("left_out", [None, ["experts"]])
def test_nothing_to_convert_is_said(
    left_out: list[str] | None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from epmoe.errors import warn

    warn.cache_clear()
    changes: dict[str, Any] = {} if left_out else {"hidden_act": "gelu"}
    config = EpmoeConfig(modules_to_not_convert=left_out)
    model = load(saved(make("olmoe", **changes), tmp_path), quantization_config=config)
    assert not packed_names(model)
    said = capfd.readouterr().err
    assert "no experts to convert in OlmoeForCausalLM: looked for modules with gate_up_proj and down_proj" in said
    assert (f"modules_to_not_convert={left_out}" if left_out else "(OlmoeExperts) has a gate (GELU") in said
    assert logits(model).isfinite().all()


def test_rows_that_groups_do_not_divide(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from epmoe.errors import warn

    warn.cache_clear()
    model = load(saved(make("mixtral", intermediate_size=48), tmp_path), quantization_config=EpmoeConfig())
    assert not packed_names(model)
    assert "has rows of 48 values in down_proj, and MXFP4 needs a multiple of 32" in capfd.readouterr().err


@pytest.mark.parametrize(("family", "method"), [("deepseek_v3", "epmoe"), ("gpt_oss", "mxfp4")])
def test_a_model_that_is_loaded_already(family: str, method: str, tmp_path: Path) -> None:
    """It becomes what it would have been loaded as, and is saved so."""
    source = saved(make(family), tmp_path / "plain")
    expected = load(source, quantization_config=EpmoeConfig())
    model = load(source)
    assert replace_with_epmoe_experts(model, EpmoeConfig()) == len(packed_names(expected))
    assert torch.equal(logits(model), logits(expected))
    names = [{name for name, _ in each.named_parameters()} for each in (model, expected)]
    assert names[0] == names[1]
    folder = saved(model, tmp_path / "saved")
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"] == method
    assert torch.equal(logits(load(folder, quantization_config=EpmoeConfig())), logits(expected))


@pytest.mark.parametrize("options", [{"dtype": torch.bfloat16}, {"dtype": "auto"}, {"device_map": "auto"}])
def test_as_people_load(options: dict[str, Any], tmp_path: Path) -> None:
    source = saved(make("mixtral").to(torch.bfloat16), tmp_path / "plain")
    model = load(source, quantization_config=EpmoeConfig(), **options)
    exact = load(source, quantization_config=EpmoeConfig())
    assert model.dtype == (torch.float32 if "device_map" in options else torch.bfloat16)
    assert len(packed_names(model)) == 2 and len(tokens(model)[0]) == 4
    for name, value in exact.state_dict().items():
        if name.endswith(("_blocks", "_scales")):  # the values were bfloat16, whatever they are loaded as
            assert torch.equal(model.state_dict()[name], value)
    saved(model, tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again", **options)), logits(model))


def test_shards(tmp_path: Path) -> None:
    model = load(saved(make("olmoe"), tmp_path / "plain"), quantization_config=EpmoeConfig())
    model.save_pretrained(tmp_path / "shards", max_shard_size="20kB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert torch.equal(logits(load(tmp_path / "shards")), logits(model))


def test_mistakes(tmp_path: Path, gpt_oss: Path) -> None:
    folder = saved(make("olmoe"), tmp_path)
    with pytest.raises(UserError, match=r"experts='nowhere' is unknown; known: triton, hub, reference, or "):
        load(folder, quantization_config=EpmoeConfig(experts="nowhere"))
    with pytest.raises(UserError, match=r"dtype=torch.float16: these experts run bfloat16 or float32"):
        load(folder, quantization_config=EpmoeConfig(), dtype=torch.float16)
    with pytest.raises(UserError, match=r"quant_method='mxfp4'"):
        EpmoeConfig(quant_method="mxfp4")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="quantised as fp8, and this reads mxfp4, epmoe or plain weights"):
        load(folder, quantization_config=EpmoeConfig())
