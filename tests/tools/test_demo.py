"""scripts/demo serve: what it prints works, and Ctrl-C ends it quietly."""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

DEMO = Path(__file__).resolve().parents[2] / "scripts" / "demo"
KEY = "for this test"


def started(*arguments: str, **env: str) -> "subprocess.Popen[str]":
    env = {**os.environ, "EPMOE_PYTHON": sys.executable, "EPMOE_API_KEY": "", **env}
    pipe = subprocess.PIPE

    def heeds_interrupts() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # who runs the tests in the background may have it ignored

    return subprocess.Popen(
        [str(DEMO), "serve", *arguments],
        env=env,
        stdout=pipe,
        stderr=pipe,
        text=True,
        start_new_session=True,
        preexec_fn=heeds_interrupts,
    )


def test_the_line_that_it_prints_is_answered() -> None:
    """Also with a key, which the line takes from where the server has it."""
    key = KEY.replace(" ", "-")
    with started("serve.port=0", "max_new_tokens=5", EPMOE_API_KEY=key) as demo:
        try:
            assert demo.stdout is not None
            line, page = demo.stdout.readline(), demo.stdout.readline()
            assert line.startswith("curl ") and key not in line
            done = subprocess.run(["bash", "-c", line], env={**os.environ, "EPMOE_API_KEY": key}, capture_output=True)
            answer = json.loads(done.stdout)
            assert answer["model"] == "epmoe-demo" and answer["usage"]["completion_tokens"] == 32, answer
            with urllib.request.urlopen(page.rpartition(" ")[2].strip(), timeout=100) as found:
                assert b"page.js" in found.read()
        finally:
            os.killpg(demo.pid, signal.SIGINT)  # Ctrl-C reaches all of them
        rest, said = demo.communicate(timeout=60)
    assert (demo.returncode, rest) == (0, ""), said
    assert "Traceback" not in said and "signal" not in said and said.count("ready in") == 1


def test_a_mistake_is_one_line() -> None:
    with started("serve.prt=8000") as demo:
        out, said = demo.communicate(timeout=60)
    assert demo.returncode == 2 and out == ""
    assert said.startswith("epmoe: error: unknown key 'serve.prt'") and said.count("\n") == 1
