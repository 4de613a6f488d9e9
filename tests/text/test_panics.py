"""Library: a panic of the tokenizers' Rust code is a user's mistake of one line, wherever it comes, without a trace."""

import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from small_bpe import make_tokenizer

from epmoe.errors import UserError
from epmoe.text.panics import guarded
from epmoe.text.tokenizer import Tokenizer

READ, ENCODE = "cannot be read as a tokenizer", "the tokenizer cannot encode the text"
CONTENT: Any = {"type": "Replace", "pattern": {"String": ""}, "content": "x"}
CHARSMAP = base64.b64encode(bytes([4, 0, 0, 0] + [0] * 8)).decode()
PANICS = {  # changes of a good file → which call they break
    "a character map that is none": ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, READ),
    "a character map too short": ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": CHARSMAP}}, ENCODE),
    "nothing replaced by something": ({"normalizer": CONTENT}, ENCODE),
    "pieces of no length": ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, ENCODE),
    "a template of unknown tokens": (
        {
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}],
                "pair": [],
                "special_tokens": {},
            }
        },
        ENCODE,
    ),
    "more stripped than there is": (
        {"decoder": {"type": "Strip", "content": "a", "start": 2**40, "stop": 2**40}},
        READ,
    ),
}


def changed(folder: Path, changes: dict[str, Any]) -> Path:
    file = make_tokenizer(folder / "tokenizer.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return file


@pytest.mark.parametrize("name", PANICS)
def test_a_panic_is_one_line_without_a_trace(tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    changes, says = PANICS[name]
    with pytest.raises(UserError, match=says) as caught:
        Tokenizer(changed(tmp_path, changes)).encode("the then", special=True)
    assert "\n" not in str(caught.value) and capfd.readouterr().err == ""


def test_the_same_file_does_panic(tmp_path: Path) -> None:
    """The library still does what is guarded against: a trace, and what `except Exception` lets through."""
    changes, _ = PANICS["a character map that is none"]
    program = f"import tokenizers; tokenizers.Tokenizer.from_file({str(changed(tmp_path, changes))!r})"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "panicked at" in ended.stderr and "PanicException" in ended.stderr


def test_a_panic_of_the_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer(make_tokenizer(tmp_path / "tokenizer.json"))

    class Broken:
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            raise BaseException("index out of bounds\nsecond line")

    monkeypatch.setattr(tokenizer, "tokenizer", Broken())
    with pytest.raises(UserError, match=r"cannot decode the answer \(index out of bounds\): take"):
        tokenizer.decode([1])


def test_what_else_is_printed_meanwhile_is_given_out(capfd: pytest.CaptureFixture[str]) -> None:
    with guarded("A", "B"):
        os.write(2, b"a warning\n")
        assert capfd.readouterr().err == ""
    assert capfd.readouterr().err == "a warning\n"
    with pytest.raises(UserError, match=r"^A \(no\): B$"), guarded("A", "B"):
        os.write(2, b"another\n")
        raise ValueError("no\nat all")
    assert capfd.readouterr().err == "another\n"
    for through in (KeyboardInterrupt, SystemExit):
        with pytest.raises(through), guarded("A", "B"):
            raise through


def test_without_a_standard_error(tmp_path: Path) -> None:
    program = "import sys, pathlib; from epmoe.text.tokenizer import Tokenizer; Tokenizer(pathlib.Path(sys.argv[1]))"
    shell = f'{sys.executable} -c "$0" "$1" 2>&-'
    ended = subprocess.run(["sh", "-c", shell, program, str(changed(tmp_path, {}))], check=False)
    assert ended.returncode == 0
