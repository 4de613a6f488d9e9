"""The environments of clients: made once, of pinned releases alone; what is missing fails; nobody goes elsewhere."""

import zipfile
from pathlib import Path

import pytest
from clients import PINS, environment, run


def wheel(folder: Path, release: str) -> None:
    """A package of one module, `tiny`, which knows its release."""
    folder.mkdir(exist_ok=True)
    info = f"tiny-{release}.dist-info"
    files = {
        "tiny.py": f"release = {release!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: tiny\nVersion: {release}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(folder / f"tiny-{release}-py3-none-any.whl", "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
        archive.writestr(f"{info}/RECORD", "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"]))


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place where pip finds packages."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    (tmp_path / "wheels").mkdir()
    return tmp_path / "wheels"


@pytest.mark.slow  # as all clients are that have environments
def test_made_once_and_anew_for_another_release(tmp_path: Path, local: Path) -> None:
    wheel(local, "1.0")
    wheel(local, "2.0")
    pins = tmp_path / "pins.txt"
    pins.write_text("# one\ntiny==1.0\n")
    python = environment(tmp_path / "made" / "one", "tiny", pins=pins)
    tell = ("-c", "import tiny; print(tiny.release)")
    assert run(tmp_path / "home", python, *tell) == "1.0\n"
    (local / "tiny-1.0-py3-none-any.whl").unlink()  # what is there is not asked for again
    assert run(tmp_path / "home", environment(tmp_path / "made" / "one", "tiny", pins=pins), *tell) == "1.0\n"
    pins.write_text("# one\ntiny==2.0\n")
    assert run(tmp_path / "home", environment(tmp_path / "made" / "one", "tiny", pins=pins), *tell) == "2.0\n"


@pytest.mark.slow
def test_what_is_missing_fails_and_is_not_there_the_next_time(tmp_path: Path, local: Path) -> None:
    pins = tmp_path / "pins.txt"
    pins.write_text("tiny==1.0\n")
    for _ in range(2):
        with pytest.raises(AssertionError, match=r"(?s)pip install .*tiny ended with 1:.*ERROR: .*tiny"):
            environment(tmp_path / "one", "tiny", pins=pins)
    wheel(local, "1.0")
    assert environment(tmp_path / "one", "tiny", pins=pins).exists()


@pytest.mark.slow
def test_a_release_that_is_not_pinned_fails(tmp_path: Path, local: Path) -> None:
    wheel(local, "1.0")
    pins = tmp_path / "pins.txt"
    pins.write_text("")
    for _ in range(2):
        with pytest.raises(AssertionError, match=r"pip installed tiny==1.0: write it into .*pins.txt"):
            environment(tmp_path / "one", "tiny", pins=pins)


def test_clients_are_pinned() -> None:
    """Each once, in the order of names, so that a change is a line."""
    lines = [line for line in PINS.read_text().splitlines() if not line.startswith("#")]
    names = [line.partition("==")[0] for line in lines]
    assert all("==" in line for line in lines) and len(set(names)) == len(names) and lines == sorted(lines)


ASKS = (  # what a test is told of a program
    ("example.invalid is another", "import socket; socket.getaddrinfo('example.invalid', 443)"),
    ("192.0.2.1 is another", "import socket; socket.create_connection(('192.0.2.1', 443), timeout=1)"),
    (
        "-c asked for example.invalid",  # also of one that goes on without
        "import contextlib, socket\nwith contextlib.suppress(OSError): socket.getaddrinfo(b'example.invalid', 443)",
    ),
)


def test_another_machine_is_refused_and_told(tmp_path: Path, local: Path) -> None:
    wheel(local, "1.0")
    pins = tmp_path / "pins.txt"
    pins.write_text("tiny==1.0\n")
    python = environment(tmp_path / "one", "tiny", pins=pins)
    for number, (says, program) in enumerate(ASKS):
        with pytest.raises(AssertionError, match=says):
            run(tmp_path / f"home{number}", python, "-c", program)
    own = "import socket; socket.getaddrinfo('localhost', 80); print(socket.create_server(('127.0.0.1', 0)) and 1)"
    assert run(tmp_path / "again", python, "-c", own) == "1\n"
