"""Options become words, whichever way they are spelled."""

import pytest

from epmoe.config.compose import parse
from epmoe.config.schema import Config, ServerConfig
from epmoe.config.words import words
from epmoe.errors import UserError

CASES: list[tuple[list[str], list[str]]] = [
    ([], []),
    (["prompt=--x y", "start"], ["prompt=--x y", "start"]),
    (["--prompt", "a=b c"], ["prompt=a=b c"]),
    (["--prompt=--x"], ["prompt=--x"]),
    (["--prompt="], ["prompt="]),
    (["--max-new-tokens", "5", "--sampling.top-k=3"], ["max_new_tokens=5", "sampling.top_k=3"]),
    (["--max_new_tokens", "5"], ["max_new_tokens=5"]),
    (["--sampling.temperature", "-1"], ["sampling.temperature=-1"]),
    (["--runtime", "cpu", "--template.budget", "5"], ["runtime=cpu", "template.budget=5"]),
    (["--resume"], ["resume=true"]),
    (["--resume", "--output", "a"], ["resume=true", "output=a"]),
    (["--resume", "output=a"], ["resume=true", "output=a"]),
    (["--resume", "False", "--sampling.ignore-eos"], ["resume=False", "sampling.ignore_eos=true"]),
    (["--cfg", "job", "--help", "-h"], ["--cfg", "job", "--help", "-h"]),
    (["--nothing"], ["nothing="]),
    (["--nothing", "3"], ["nothing=3"]),
    (["--"], ["="]),
]


@pytest.mark.parametrize(("argv", "expected"), CASES, ids=[" ".join(argv) or "none" for argv, _ in CASES])
def test_options(argv: list[str], expected: list[str]) -> None:
    assert words(argv, [Config]) == expected


def test_all_of_a_command_line() -> None:
    found = parse(
        words(["--serve.port", "9", "--serve.max-body=5", "--runtime.prefix-cache", "max_tokens=3"], [ServerConfig]),
        ServerConfig,
    )
    assert (found.serve.port, found.serve.max_body, found.runtime.prefix_cache, found.max_new_tokens) == (9, 5, True, 3)


@pytest.mark.parametrize("argv", [["--prompt"], ["--prompt", "--resume"], ["--max-new-tokens"], ["--sampling.stop"]])
def test_a_key_without_a_value(argv: list[str]) -> None:
    with pytest.raises(UserError, match=f"{argv[0]} has no value: write {argv[0]}=VALUE"):
        words(argv, [Config])


def test_an_unknown_key_is_refused_by_name() -> None:
    for argv in (["--max-new-token", "3"], ["--max-new-token"], ["--"]):
        with pytest.raises(UserError, match="unknown key"):
            parse(words(argv, [Config]))
