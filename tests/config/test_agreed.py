"""Agreed: of every key it is decided whether ranks must have the same value."""

from dataclasses import replace

import pytest

from epmoe.bench.options import BenchConfig, LoadConfig, StartConfig
from epmoe.config.agreed import OWN, agreed
from epmoe.config.compose import parse
from epmoe.config.keys import keys_of
from epmoe.config.schema import ChatConfig, Config, LLMConfig, ModelKeys, ServeConfig, ServerConfig

# A new key stands here or in OWN: may a rank have a value of its own without another text, a hang or an abort?
SHARED = {
    "quant", "quant_scale", "experts", "router", "combine", "placement", "mesh.attention",
    "runtime.device", "runtime.dtype", "runtime.threads", "runtime.page", "runtime.prefill_chunk", "runtime.max_batch",
    "runtime.cache_tokens", "runtime.prefix_cache", "runtime.graphs", "speculate", "draft_model", "hub.kernel",
    "hub.bitwise", "mesh.replica", "mesh.expert",
}  # fmt: skip
MEASURED = {
    "size", "batches", "prompt_tokens", "lengths", "prefill", "first", "mixed", "samples", "repeat", "bandwidth",
    "flops", "compare", "sampling",
}  # fmt: skip
LOAD = {
    "size", "load", "rate", "users", "requests", "prompt_tokens", "answer_tokens", "turns", "seed", "serve.step_tokens",
}  # fmt: skip
START = {"size", "ranks", "sequences", "prompt_tokens", "repeat"}


@pytest.mark.parametrize(
    ("schema", "more"),
    [
        (ModelKeys, set()),
        (LLMConfig, set()),
        (Config, set()),
        (ChatConfig, set()),
        (ServeConfig, {"serve.step_tokens"}),
        (ServerConfig, {"serve.step_tokens"}),
        (BenchConfig, MEASURED),
        (LoadConfig, LOAD),
        (StartConfig, START),
    ],
)
def test_every_key_is_decided(schema: type[ModelKeys], more: set[str]) -> None:
    assert set(agreed(schema())) == SHARED | more
    assert set(keys_of(schema)) <= SHARED | more | set(OWN)


def test_own_names_keys_that_exist() -> None:
    assert set(OWN) <= {*keys_of(Config), *keys_of(ServerConfig), *keys_of(ChatConfig)} and not set(OWN) & SHARED


def test_values_are_spelled_as_on_the_command_line() -> None:
    config = parse(["batches=1,2", "prefill=2x64", "runtime.prefill_chunk=8", "quant=bf16"], BenchConfig)
    found = agreed(config)
    assert (found["batches"], found["prefill"], found["runtime.prefill_chunk"], found["quant"]) == (
        "1,2", "2x64", "8", "bf16",
    )  # fmt: skip
    assert agreed(replace(config, prefill=None))["prefill"] == ""
