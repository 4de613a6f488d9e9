"""The installed command: which command it runs, alone and under torchrun; what is none."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from forked import python

from epmoe import __main__, __version__
from epmoe.__main__ import COMMANDS

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def command(*words: str, start: tuple[str, ...] = ()) -> "subprocess.CompletedProcess[str]":
    if not start:
        return python("-m", "epmoe", *words)
    run = [sys.executable, *start, "-m", "epmoe", *words]
    return subprocess.run(run, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)


def test_help_names_the_commands() -> None:
    done = command("--help")
    assert done.returncode == 0 and all(f"  epmoe {name} " in done.stdout for name in COMMANDS) and done.stderr == ""
    assert command("--version").stdout == f"{__version__}\n"


@pytest.mark.parametrize("words", [(), ("",), ("Generate", "prompt=x"), ("--prompt", "x"), ("bad\nname",)])
def test_what_is_no_command(words: tuple[str, ...]) -> None:
    done = command(*words)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("epmoe: error: ") and ", ".join(COMMANDS) in done.stderr


def test_generate(tmp_path: Path) -> None:
    """Options and words; its help and its mistakes are those of epmoe.generate."""
    output = tmp_path / "answers.jsonl"
    done = command("generate", "--runtime", "cpu", "--max-new-tokens=4", "prompt=In the", "--output", str(output))
    assert done.returncode == 0 and done.stdout.strip() and output.exists(), done.stderr
    shown = command("generate", "--cfg", "job", "--prompt", "é, ${x}")
    assert shown.returncode == 0 and yaml.safe_load(shown.stdout)["prompt"] == "é, ${x}"
    for wrong, says in ((("--max-new-token", "4"), "did you mean max_new_tokens?"), (("--prompt",), "has no value")):
        done = command("generate", *wrong)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and says in done.stderr


@pytest.mark.slow  # other commands are below torchrun in tests/whole
def test_under_torchrun() -> None:
    done = command("generate", "--runtime.device=cpu", "--max-new-tokens", "4", "prompt=In the", start=TORCHRUN)
    assert done.returncode == 0 and done.stdout.count("\n") == 1, done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_its_help(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[Callable[[], None]] = []
    monkeypatch.setattr(sys, "argv", ["epmoe", name, "--help"])
    monkeypatch.setattr("epmoe.ranks.command.main", ran.append)
    monkeypatch.setattr("epmoe.ranks.guard.begin", lambda: None)
    __main__.run()
    (body,) = ran
    with pytest.raises(SystemExit) as ended:
        body()
    assert ended.value.code == 0 and "Keys, each with its default:" in capsys.readouterr().out
