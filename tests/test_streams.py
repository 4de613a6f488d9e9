"""Streams: with a standard stream closed, nothing that is said lands in a file of the run."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, sys
from epmoe import streams
if {early}:
    streams.open_missing()
with open(sys.argv[1], "w") as file:
    file.write("data\\n")
    file.flush()
    streams.tell("a message")
    streams.tell_raw("another\\n")
    for number in (1, 2):
        try:
            os.write(number, b"raw\\n")
        except OSError:
            pass
    if sys.stdout:
        print("text", flush=True)
    assert sys.stdin is None or sys.stdin.read() == ""
"""


def ended(place: Path, redirect: str, *, early: bool = True) -> tuple[int, str, str, str]:
    """Exit code, standard output, standard error, the file."""
    script, data = place / "script.py", place / "data"
    script.write_text(SCRIPT.format(early=early))
    done = subprocess.run(
        ["bash", "-c", f'"$0" "$1" "$2" {redirect}', sys.executable, script, data],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
    )
    return done.returncode, done.stdout, done.stderr, data.read_text()


@pytest.mark.parametrize(
    ("redirect", "out", "err"),
    [
        ("", "raw\ntext\n", "a message\nanother\nraw\n"),
        (">&-", "", "a message\nanother\nraw\n"),
        ("2>&-", "raw\ntext\n", ""),
        ("<&-", "raw\ntext\n", "a message\nanother\nraw\n"),
        ("<&- >&- 2>&-", "", ""),
        ("2>/dev/full", "raw\ntext\n", ""),
    ],
)
def test_what_is_said_goes_to_its_stream_or_nowhere(tmp_path: Path, redirect: str, out: str, err: str) -> None:
    assert ended(tmp_path, redirect) == (0, out, err, "data\n")


def test_without_it_the_file_gets_what_is_said(tmp_path: Path) -> None:
    """What the module is there for; `tell` itself goes nowhere even so."""
    code, _, _, data = ended(tmp_path, "2>&-", early=False)
    assert code == 0 and data == "data\nraw\n"
