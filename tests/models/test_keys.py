"""Reading config.json: a misspelled key is not silently another number."""

import copy
from typing import Any

import pytest

from epmoe.errors import UserError, warn
from epmoe.models.gpt_oss import GptOssConfig
from epmoe.models.keys import Keys
from tests.models.test_gpt_oss import PUBLISHED, YARN


def said(config: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> list[str]:
    warn.cache_clear()
    GptOssConfig.from_json(config)
    return capsys.readouterr().err.splitlines()


def renamed(old: str, new: str, inside: str = "") -> dict[str, Any]:
    config = copy.deepcopy(PUBLISHED)
    place = config[inside] if inside else config
    place[new] = place.pop(old)
    return config


def test_published_keys_raise_no_doubt(capsys: pytest.CaptureFixture[str]) -> None:
    more = {
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "router_aux_loss_coef": 0.9,
        "use_cache": True,
        "bos_token_id": 1,
        "pad_token_id": 2,
    }
    assert said({**PUBLISHED, **more, "torch_dtype": "bfloat16", "architectures": ["GptOssForCausalLM"]}, capsys) == []


@pytest.mark.parametrize(
    ("config", "wrong", "right"),
    [
        (renamed("truncate", "truncat", "rope_scaling"), "rope_scaling.truncat ", "truncate"),
        (renamed("beta_fast", "betaFast", "rope_scaling"), "rope_scaling.betaFast ", "beta_fast"),
        (renamed("beta_slow", "beta-slow", "rope_scaling"), "rope_scaling.beta-slow ", "beta_slow"),
        ({**PUBLISHED, "rope_scaling": {**YARN, "atention_factor": 1.2}}, ".atention_factor ", "attention_factor"),
        ({**PUBLISHED, "quantisation_config": {}}, "quantisation_config ", "quantization_config"),
        ({**PUBLISHED, "swiglu_aplha": 1.7}, "swiglu_aplha ", "swiglu_alpha"),
        (renamed("tie_word_embeddings", "tie_words_embeddings"), "tie_words_embeddings ", "tie_word_embeddings"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_misspelled_key_is_told_with_what_it_resembles(
    config: dict[str, Any], wrong: str, right: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (line,) = said(config, capsys)
    assert (
        line.startswith("epmoe: warning: config.json: ") and wrong in line and f" {right}, which it resembles" in line
    )
    GptOssConfig.from_json(config)
    assert not capsys.readouterr().err  # once


def test_only_rank_zero_tells(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert said({**PUBLISHED, "swiglu_aplha": 1.7}, capsys) == []


def test_a_key_that_is_missing_names_the_one_that_was_meant() -> None:
    with pytest.raises(UserError, match=r"factor is missing, .*; is rope_scaling.facter a misspelling of it"):
        GptOssConfig.from_json(renamed("factor", "facter", "rope_scaling"))


def test_what_is_left_out_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    config = {name: value for name, value in PUBLISHED.items() if name not in ("head_dim", "swiglu_limit")}
    assert said(config, capsys) == [
        "epmoe: warning: config.json leaves keys out, which are taken as transformers takes them: head_dim=64, "
        "swiglu_limit=7.0"
    ]
    left_out, doubt = said(renamed("hidden_size", "hiden_size"), capsys)
    assert "hidden_size=2880" in left_out and "hiden_size is a key that nothing reads, and hidden_size, which" in doubt


def test_a_key_beside_the_right_one_is_no_misspelling(capsys: pytest.CaptureFixture[str]) -> None:
    """Two names for one thing: the other one was read."""
    warn.cache_clear()
    keys = Keys({"beta_fast": 1.0, "betafast": 2.0}, "config.json")
    assert keys.number("beta_fast") == 1.0
    keys.end()
    assert not capsys.readouterr().err
