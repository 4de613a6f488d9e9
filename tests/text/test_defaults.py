"""What a request leaves out: from the configuration, generation_config.json or nobody."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from epmoe.config.compose import from_keys
from epmoe.engine.request import SamplingParams
from epmoe.errors import UserError
from epmoe.text.defaults import decided, default_params, stored_params


def checkpoint(**generation: Any) -> Any:
    return SimpleNamespace(path=Path("/model"), generation_config=generation)


STORED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"eos_token_id": 5, "transformers_version": "5.0"}, {}),
    ({"temperature": 1, "top_p": 0.9, "top_k": 20, "min_p": 0, "repetition_penalty": 1.05, "max_new_tokens": 9},
     {"temperature": 1.0, "top_p": 0.9, "top_k": 20, "min_p": 0.0, "repetition_penalty": 1.05, "max_new_tokens": 9}),
    ({"temperature": None, "top_k": None, "do_sample": None}, {}),
    ({"do_sample": True}, {"temperature": 1.0}),
    ({"do_sample": True, "temperature": 0.6}, {"temperature": 0.6}),
    ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, {"temperature": 0.0, "top_p": 0.9}),
]  # fmt: skip


@pytest.mark.parametrize(("said", "found"), STORED, ids=[json.dumps(each[0]) for each in STORED])
def test_what_generation_config_says(said: dict[str, Any], found: dict[str, Any]) -> None:
    assert stored_params(checkpoint(**said)) == found


WRONG: dict[str, dict[str, Any]] = {
    "temperature=-1 is out of range": {"temperature": -1},
    "temperature='hot' is not a number": {"temperature": "hot"},
    "top_k=1.5 is not a whole number": {"top_k": 1.5},
    "top_p=0 is out of range": {"top_p": 0},
    "top_p=True is not a number": {"top_p": True},
    "min_p=2 is out of range": {"min_p": 2},
    "repetition_penalty=[1] is not a number": {"repetition_penalty": [1]},
    "max_new_tokens=0 is out of range": {"max_new_tokens": 0},
    "do_sample='yes' is not true or false": {"do_sample": "yes"},
    "do_sample=0 is not true or false": {"do_sample": 0},
}


@pytest.mark.parametrize("message", WRONG)
def test_damaged_values_name_file_and_key(message: str) -> None:
    with pytest.raises(UserError) as error:
        stored_params(checkpoint(**WRONG[message]))
    said = str(error.value)
    assert said.startswith(f"/model/generation_config.json: {message}") and "\n" not in said and "correct it" in said


def test_the_configuration_wins_and_one_line_says_what_the_file_gave(capsys: pytest.CaptureFixture[str]) -> None:
    said = checkpoint(temperature=0.6, top_p=0.95, top_k=1234567, do_sample=True)
    found = default_params(from_keys({"sampling": {"top_p": 1.0}, "max_tokens": 5}), said)
    assert found == SamplingParams(temperature=0.6, top_p=1.0, top_k=1234567, max_new_tokens=5)
    assert capsys.readouterr().err == "epmoe: temperature=0.6, top_k=1234567 (generation_config.json)\n"
    greedy = default_params(from_keys({"sampling": "greedy"}), checkpoint(do_sample=True))
    assert greedy.settled() == SamplingParams().settled()
    assert capsys.readouterr().err == ""


def test_a_seed_is_drawn_where_one_is_needed() -> None:
    warm = SamplingParams(temperature=1.0)
    seeds = {decided("prompt 1", warm, draw=True).seed for _ in range(50)}
    assert len(seeds) == 50 and all(seed is not None and 0 <= seed < 2**53 for seed in seeds)
    assert decided("prompt 1", SamplingParams(temperature=1.0, seed=7), draw=True).seed == 7
    assert decided("prompt 1", warm, draw=False).seed == 0
    assert decided("prompt 1", SamplingParams(), draw=True) == SamplingParams().settled()


def test_several_answers_need_a_temperature() -> None:
    for params in (SamplingParams(n=2), SamplingParams(n=2, temperature=0.0)):
        with pytest.raises(UserError, match=r"^prompt 3: n=2 answers would be one and the same: give a temperature"):
            decided("prompt 3", params, draw=True)
