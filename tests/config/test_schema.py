"""Every key is declared once: one type, one default, one range for the configuration and for a request."""

import subprocess
import sys
from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest

from epmoe.bench.options import BenchConfig
from epmoe.config.compose import parse
from epmoe.config.keys import Biases, ByToken, Names, Numbers, Range, Variables, keys_of
from epmoe.config.schema import ChatConfig, Config, Length, LLMConfig, ModelKeys, Sampling, ServeConfig, ServerConfig
from epmoe.engine.request import SamplingParams
from epmoe.errors import UserError

SCHEMAS = (Config, LLMConfig, ServeConfig, ServerConfig, ChatConfig, BenchConfig, ModelKeys, SamplingParams)


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_key_takes_its_default(schema: type) -> None:
    for each in keys_of(schema).values():
        found = each.accept(each.default)
        assert found == each.default and type(found) is type(each.default)


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_key_says_what_it_takes(schema: type) -> None:
    """A number has a range, even an open one; a range or names fit the type."""
    for each in keys_of(schema).values():
        assert each.about and "\n" not in each.about
        if each.kind in (int, float):
            assert isinstance(each.allowed, Range)
        elif each.kind is str:
            assert each.allowed is None or isinstance(each.allowed, Names)
        elif each.kind is bool or each.kind in (tuple[str, ...], Variables):
            assert each.allowed is None
        elif each.kind == Biases:
            assert isinstance(each.allowed, ByToken)
        else:
            assert isinstance(each.allowed, Numbers)


def test_a_request_and_the_configuration_share_every_declaration() -> None:
    """Not equal ranges but the same object: a second declaration could come to differ."""
    asked, configured = keys_of(SamplingParams), keys_of(Config)
    assert {*asked} == {each.name for each in fields(Sampling)} | {"max_new_tokens"}
    for name, each in asked.items():
        other = configured[name if name == "max_new_tokens" else f"sampling.{name}"]
        assert each.allowed is other.allowed and each.about is other.about and each.default is other.default
        assert each.kind == other.kind
    numbers = {name for name, each in asked.items() if each.kind in (int, float)}
    assert numbers == {
        "max_new_tokens",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "frequency_penalty",
        "presence_penalty",
        "min_tokens",
        "seed",
        "n",
        "logprobs",
        "prompt_logprobs",
    }
    assert all(isinstance(asked[name].allowed, Range) for name in numbers)


def test_what_all_commands_share_is_declared_once() -> None:
    for name, each in keys_of(ModelKeys).items():
        assert all(keys_of(schema)[name] == each for schema in (Config, LLMConfig, BenchConfig))
        assert all(keys_of(schema)[name].allowed is each.allowed for schema in (Config, LLMConfig, BenchConfig))


# key → the least, the most and others that are right; what is just too much or too little
EDGES: dict[str, tuple[list[Any], list[Any]]] = {
    "temperature": ([0, 0.0, 1e-6, 1e6], [-1e-6, 0.999e-6, 1.001e6, float("inf"), float("nan")]),
    "top_p": ([5e-324, 1e-9, 1, 1.0], [0, 0.0, -0.1, 1.0000001, float("nan")]),
    "min_p": ([0, 1], [-1e-9, 1.0000001, float("nan")]),
    "top_k": ([0, 1, 2**63 - 1], [-1, 2**63]),
    "repetition_penalty": ([1e-6, 0.5, 1e6], [0, 0.0, -1, 0.9e-6, 1e7, float("inf"), float("nan")]),
    "frequency_penalty": ([-2, 0, 2.0], [-2.01, 2.01, float("nan")]),
    "presence_penalty": ([-2, 0, 2.0], [-2.01, 2.01, float("inf")]),
    "min_tokens": ([0, 2**63 - 1], [-1]),
    "seed": ([0, 2**63 - 1], [-1, 2**63]),
    "n": ([1, 1024], [0, 1025]),
    "logprobs": ([0, 100], [-1, 101]),
    "prompt_logprobs": ([0, 100], [-1, 101]),
    "max_new_tokens": ([1, 2**63 - 1], [0, -1]),
}


@pytest.mark.parametrize("name", EDGES)
def test_ranges_of_sampling(name: str) -> None:
    """The command line and a request take the same values: what only the second refused would be refused late."""
    full = name if name == "max_new_tokens" else f"sampling.{name}"
    right, wrong = EDGES[name]
    for value in right:
        found = parse([f"{full}={value}"])
        own = getattr(found if name == "max_new_tokens" else found.sampling, name)
        assert own == getattr(SamplingParams(**{name: value}), name) == value
    for value in wrong:
        with pytest.raises(UserError, match=f"^{full}=.* is out of range: it takes"):
            parse([f"{full}={value}"])
        with pytest.raises(UserError, match=f"^{name}=.* is out of range: it takes"):
            SamplingParams(**{name: value})


def test_a_request_checks_types_and_brings_values_to_them() -> None:
    params = SamplingParams(temperature=1, stop=["a", "b"])  # type: ignore[arg-type]
    assert type(params.temperature) is float and params.stop == ("a", "b")
    assert SamplingParams(stop="ab").stop == ("ab",)  # type: ignore[arg-type]
    for wrong in ({"top_k": 2.0}, {"seed": True}, {"temperature": "hot"}, {"stop": 3}, {"n": 1.0}, {"ignore_eos": 1}):
        (name,) = wrong
        with pytest.raises(UserError, match=f"^{name}=.* is not "):
            SamplingParams(**wrong)


def test_stop_token_ids_are_ids_or_none_at_all() -> None:
    for word, ids in {"3": (3,), "200002, 0": (200002, 0), "": ()}.items():
        assert parse([f"sampling.stop_token_ids={word}"]).sampling.stop_token_ids == ids
        assert SamplingParams(stop_token_ids=list(ids)).stop_token_ids == ids  # type: ignore[arg-type]
    for wrong in ("-1", "a", "1,", ",", "1.0"):
        with pytest.raises(
            UserError, match=r"^sampling\.stop_token_ids=.* is not whole numbers, at least 0.* or none$"
        ):
            parse([f"sampling.stop_token_ids={wrong}"])
    for value in (-1, [-1], "1", [1.0], [True], None, [[1]]):
        with pytest.raises(UserError, match=r"^stop_token_ids=.* is not whole numbers, at least 0"):
            SamplingParams(stop_token_ids=value)  # type: ignore[arg-type]


def test_allowed_token_ids_are_ids_or_left_out() -> None:
    assert parse(["sampling.allowed_token_ids=3,1"]).sampling.allowed_token_ids == (3, 1)
    assert parse(["sampling.allowed_token_ids="]).sampling.allowed_token_ids is None
    assert SamplingParams(allowed_token_ids=[7]).allowed_token_ids == (7,)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^allowed_token_ids=\[\] is not whole numbers, at least 0"):
        SamplingParams(allowed_token_ids=[])  # type: ignore[arg-type]


def test_biases_by_token() -> None:
    """As OpenAI's JSON has them, as Python, as pairs, on the command line; one form comes out, which goes in again."""
    wanted = ((0, -100.0), (17, 2.5))
    for given in ({"17": 2.5, "0": -100}, {17: 2.5, 0: -100.0}, [[17, 2.5], [0, -100]], wanted):
        assert SamplingParams(logit_bias=given).logit_bias == wanted  # type: ignore[arg-type]
    for word, found in {"17:2.5,0:-100": wanted, "17:2.5, 0:-1e2": wanted, "": ()}.items():
        assert parse([f"sampling.logit_bias={word}"]).sampling.logit_bias == found
    key = keys_of(SamplingParams)["logit_bias"]
    assert key.read(key.spelled(wanted)) == wanted
    for wrong in ("17", "a:1", "1:x", "1:2:3", "1:101", "1:nan", "-1:0", "1:0,1:0", ","):
        with pytest.raises(UserError, match=r"^sampling\.logit_bias=.* is not ID:NUMBER,… of token ids, numbers from"):
            parse([f"sampling.logit_bias={wrong}"])
    for value in ({"a": 1}, {1: True}, {1: "2"}, {-1: 1}, {"1": 1, 1: 1}, 3, None, [1], [(1, 2, 3)], {1: -100.5}):
        with pytest.raises(UserError, match=r"^logit_bias=.* is not ID:NUMBER,… of token ids, numbers"):
            SamplingParams(logit_bias=value)  # type: ignore[arg-type]


def test_schemas_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        Length().max_new_tokens = 3  # type: ignore[misc]


def test_a_request_needs_neither_torch_nor_hydra() -> None:
    program = "import sys, epmoe.engine.request; print(*{'torch', 'hydra', 'omegaconf', 'yaml'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
