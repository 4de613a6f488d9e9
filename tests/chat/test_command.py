"""epmoe chat as users start it: at a terminal, through pipes, and with a server that has the model."""

import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from answering import answering
from scripted import scripted

from epmoe.chat.command import chat, interruptible
from epmoe.errors import UserError

WITHIN_S = 60
COMMAND = [sys.executable, "-m", "epmoe", "chat"]
CHAIN = (
    "t",
    "<|channel|>",
    "analysis",
    "<|message|>",
    "They ask",
    " for rain.",
    "<|end|>",
    "It r",
    "ains",
    "!",
    "<|return|>",
)
DIM, PLAIN = "\x1b[2m", "\x1b[0m"


class Terminal:
    """A chat at a terminal."""

    def __init__(self, *keys: str, term: str = "xterm") -> None:
        self.end, other = pty.openpty()
        env = {**os.environ, "TERM": term, "NO_COLOR": "", "EPMOE_API_KEY": "", "INPUTRC": "/dev/null"}
        self.process = subprocess.Popen(
            [*COMMAND, *keys], stdin=other, stdout=other, stderr=other, env=env, preexec_fn=_own_terminal
        )
        os.close(other)
        self.said = ""

    def until(self, text: str, within_s: float = WITHIN_S) -> str:
        """What comes up to this text, which it waits for."""
        deadline = time.monotonic() + within_s
        while text not in self.said:
            assert select.select([self.end], [], [], max(0.0, deadline - time.monotonic()))[0], self.said
            try:
                piece = os.read(self.end, 1 << 16)
            except OSError:  # the other end has closed
                piece = b""
            assert piece, self.said
            self.said += piece.decode().replace("\r\n", "\n").replace("\x1b[?2004h", "").replace("\x1b[?2004l\r", "")
        found, _, self.said = self.said.partition(text)
        return found + text

    def type(self, text: str) -> None:
        os.write(self.end, text.encode())

    def interrupt(self, text: str) -> None:
        """Press Ctrl-C until this text comes: readline overlooks one between its prompt and its wait."""
        for _ in range(WITHIN_S):
            self.type("\x03")
            with suppress(AssertionError):
                self.until(text, 1)
                return
        raise AssertionError(self.said)


def _own_terminal() -> None:
    """Its terminal is that of standard input, so that Ctrl-C is a signal to it."""
    os.setsid()
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@contextmanager
def talking(*keys: str, term: str = "xterm") -> Iterator[Terminal]:
    terminal = Terminal(*keys, term=term)
    try:
        yield terminal
    finally:
        with suppress(ProcessLookupError):
            terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.end)


def piped(lines: str, *keys: str) -> "subprocess.CompletedProcess[str]":
    env = {**os.environ, "EPMOE_API_KEY": ""}
    return subprocess.run([*COMMAND, *keys], input=lines, capture_output=True, text=True, timeout=WITHIN_S, env=env)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scripted(tmp_path_factory.mktemp("chat") / "checkpoint", CHAIN)


def test_a_conversation_at_a_terminal(checkpoint: Path) -> None:
    """Reasoning is dimmed; commands; what was said comes back by the history; Ctrl-D ends it with 0."""
    with talking("--checkpoint", str(checkpoint), "--runtime", "cpu", "--sampling=greedy") as terminal:
        assert "/help explains" in terminal.until("> ")
        terminal.type("Rain?\n")
        assert f"{DIM}They ask for rain.{PLAIN}\n\nIt rains!\n" in terminal.until("> ").replace("\x1b[?2004h", "")
        terminal.type("/nothing\n")
        assert "/nothing is no command" in terminal.until("\n> ")
        terminal.type("\x10\x10\n")  # two lines back
        assert "Rain?" in terminal.until("It rains!")
        terminal.until("> ")
        terminal.interrupt("> ")  # at the prompt it asks again
        terminal.type("\x04")
        assert terminal.process.wait(WITHIN_S) == 0


def test_a_server_and_no_colours() -> None:
    thought, said = (
        {"choices": [{"delta": {name: text}}]} for name, text in (("reasoning", "Hm."), ("content", "Yes"))
    )
    body = "".join(f"data: {each}\n\n" for each in (json.dumps(thought), json.dumps(said), "[DONE]"))
    with (
        answering(body.encode()) as port,
        talking(f"base_url=http://127.0.0.1:{port}/v1", "model=m", term="dumb") as one,
    ):
        one.until("> ")
        one.type("Rain?\n")
        found = one.until("Yes\n")
        assert "Hm.\n\nYes" in found and DIM not in found
        one.until("> ")
        one.type("/quit\n")
        assert one.process.wait(WITHIN_S) == 0


def test_ctrl_c_stops_an_answer_and_not_the_program() -> None:
    with talking("--runtime", "cpu", "--runtime.cache-tokens=4096", "--sampling.ignore-eos") as terminal:
        terminal.until("> ")
        for _ in range(2):
            terminal.type("It was a fine morning\n")
            terminal.until(" the")
            terminal.type("\x03")
            terminal.until("epmoe: stopped")
            terminal.until("> ")
        terminal.type("/reset\n")
        terminal.until("> ")
        terminal.type("And then\n")
        terminal.until(" the")
        terminal.process.send_signal(signal.SIGTERM)
        assert terminal.process.wait(WITHIN_S) == 143


def test_pipes_have_answers_alone(checkpoint: Path) -> None:
    """No reasoning, no escapes."""
    lines = "Rain?\n\n/system Be brief.\n//Rain?\n/reset\nRain?"
    done = piped(lines, f"checkpoint={checkpoint}", "runtime=cpu", "sampling=greedy")
    assert done.returncode == 0 and done.stdout == "It rains!\n" * 3, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (("base_url=http://x/v1", "checkpoint=y"), "exclude each other"),
        (("model=x",), "without base_url"),
        (("sampling.n=2",), "sampling.n=2"),
        (("prompt=x",), "prompt means nothing to a chat"),
    ],
)
def test_keys_that_mean_nothing(monkeypatch: pytest.MonkeyPatch, keys: tuple[str, ...], says: str) -> None:
    monkeypatch.setattr(sys, "argv", ["epmoe chat", *keys])
    with pytest.raises(UserError, match=says):
        chat()


def test_several_ranks_have_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "9",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["epmoe chat"])
    with pytest.raises(UserError, match="base_url="):
        chat()


def test_the_guard_hears_nothing_of_a_conversation() -> None:
    """It would end the process six seconds after Ctrl-C. Afterwards all is as before."""
    handler = signal.getsignal(signal.SIGINT)
    here, there = socket.socketpair()
    with here, there:
        there.setblocking(False)
        before = signal.set_wakeup_fd(there.fileno())
        try:
            with interruptible(), pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
                time.sleep(1)
            here.setblocking(False)
            with pytest.raises(BlockingIOError):
                here.recv(1)
            assert signal.set_wakeup_fd(there.fileno()) == there.fileno()
        finally:
            signal.set_wakeup_fd(before)
    assert signal.getsignal(signal.SIGINT) == handler
