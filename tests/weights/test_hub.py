"""Hub: a checkpoint is a directory, in the local cache, or downloaded once; what fails, fails with one line."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from epmoe.errors import UserError
from epmoe.weights import hub
from epmoe.weights.checkpoint import INDEX, Checkpoint
from epmoe.weights.hub import resolve
from epmoe.weights.synthetic import make_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cache_up(cache: Path, name: str, **spec: object) -> Path:
    """A checkpoint laid out as huggingface_hub's cache does: blobs, a ref, a snapshot of links."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot, blobs = repository / "snapshots" / COMMIT, repository / "blobs"
    for folder in (snapshot, blobs, repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    made = make_checkpoint(cache / "made", "tiny", **spec)
    (made / "special_tokens_map.json").write_text("{}")
    for number, file in enumerate(sorted(made.iterdir())):
        shutil.move(file, blobs / f"{number:040x}")
        (snapshot / file.name).symlink_to(os.path.relpath(blobs / f"{number:040x}", snapshot))
    made.rmdir()
    return snapshot


def resolve_offline(cache: Path, *names: str) -> list[str]:
    """Each name's path or error, from a fresh process with HF_HUB_OFFLINE=1 and its cache in `cache`."""
    code = (
        "import sys, json\n"
        "from epmoe.weights.hub import resolve\n"
        "from epmoe.errors import UserError\n"
        "def attempt(name):\n"
        "    try: return str(resolve(name))\n"
        "    except UserError as error: return f'error: {error}'\n"
        "print(json.dumps([attempt(name) for name in sys.argv[1:]]))"
    )
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache), "HF_HOME": str(cache)}
    done = subprocess.run([sys.executable, "-c", code, *names], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_offline_the_cache_serves_what_is_complete(tmp_path: Path) -> None:
    whole = cache_up(tmp_path, "owner/whole", shards=2)
    cut_off = cache_up(tmp_path, "owner/cut-off", shards=2)
    next(cut_off.glob("model-00002*")).unlink()
    empty = cache_up(tmp_path, "owner/no-weights")
    (empty / "model.safetensors").unlink()
    for number, file in enumerate(hub.OPTIONAL):
        (cache_up(tmp_path, f"owner/less-{number}") / file).unlink()
    less = [f"owner/less-{number}" for number in range(len(hub.OPTIONAL))]
    (cache_up(tmp_path, "owner/mute") / "tokenizer.json").unlink()
    lines = {
        "owner/cut-off": f"is not complete in the local cache {tmp_path} (missing: model-00002-of-00002.safetensors)",
        "owner/no-weights": f"is not complete in the local cache {tmp_path} (missing: model.safetensors)",
        "owner/mute": ": tokenizer.json is not in the local cache",
        "owner/unknown": f"is not in the local cache {tmp_path}",
    }
    found = resolve_offline(tmp_path, "owner/whole", *less, *lines)
    assert found[0] == str(whole) and len(Checkpoint.open(found[0]).files) == 2
    assert all(Checkpoint.open(path).tokenizer_file for path in found[1 : 1 + len(less)])
    for (name, says), line in zip(lines.items(), found[1 + len(less) :], strict=True):
        assert line.startswith(f"error: checkpoint={name}") and says in line and "\n" not in line
        assert "HF_HUB_OFFLINE is set" in line


def test_a_directory_needs_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one whose relative path looks like a Hub id; and the model that ships with the package."""
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    assert resolve(str(tmp_path)) == tmp_path
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("owner/name") == Path("owner/name")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/owner") == tmp_path / "owner"
    assert resolve("") == hub.DEMO


@pytest.mark.parametrize(
    "name",
    [
        "/no/such/place",
        "~nobody-of-this-name/x",
        "a" * 5000,
        "new\nline",
        "./owner/name",
        "name",
        "a/b/c",
        "owner/na me",
        "~/nothing",
        "../x",
        "-a/b",
        "a/b..c",
        "a/b--c",
    ],
)
def test_what_is_neither_a_directory_nor_an_id(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # where the relative ones do not exist
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(UserError, match="is no directory on this machine and no Hub id") as caught:
        resolve(name)
    assert "\n" not in str(caught.value)


Online = Callable[..., list[list[str]]]


@pytest.fixture
def online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Online]:
    """Replaces the downloaders by ones that "download" by calling a function; gives the list of what was asked for:
    the patterns of a snapshot, or one file and its commit.

    `small(file)` is called for one file. Where it makes none, the repository has none, and a mark is left in the cache
    as huggingface_hub leaves it; the reader of marks is the library's own.
    """

    def install(download: Callable[[], object], small: Callable[[str], object] = lambda file: None) -> list[list[str]]:
        calls: list[list[str]] = []
        repository = tmp_path / "models--owner--name"

        def snapshot_download(name: str, *, allow_patterns: list[str]) -> str:
            calls.append(allow_patterns)
            download()
            return str(repository / "snapshots" / COMMIT)

        def hf_hub_download(name: str, file: str, *, revision: str) -> str:
            calls.append([file, revision])
            small(file)
            found = repository / "snapshots" / revision / file
            if not found.exists():
                mark = repository / ".no_exist" / revision / file
                mark.parent.mkdir(parents=True, exist_ok=True)
                mark.touch()
                raise EntryNotFoundError(f"404: no {file}")
            return str(found)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        return calls

    yield install


def never() -> None:
    raise AssertionError("weights are downloaded that are there")


@pytest.mark.parametrize("file", ["tokenizer.json", *hub.OPTIONAL])
def test_a_small_file_that_the_cache_lacks_is_fetched(tmp_path: Path, online: Online, file: str) -> None:
    """It alone, of the commit whose weights are there, and once."""
    lost = cache_up(tmp_path, "owner/name") / file
    content = lost.read_bytes()
    lost.unlink()
    calls = online(never, lambda name: (lost.parent / name).write_bytes(content))
    assert resolve("owner/name") == lost.parent and lost.read_bytes() == content
    assert resolve("owner/name") and calls == [[file, COMMIT]]


def test_a_repository_without_a_small_file_is_asked_once(tmp_path: Path, online: Online) -> None:
    """After a download as well, and never for what is there."""
    for file in hub.OPTIONAL:
        (cache_up(tmp_path, "owner/name") / file).unlink()
        calls = online(never)
        assert Checkpoint.open(resolve("owner/name")).tokenizer_file and calls == [[file, COMMIT]]
        assert resolve("owner/name") and len(calls) == 1
        shutil.rmtree(tmp_path / "models--owner--name")
    calls = online(lambda: (cache_up(tmp_path, "owner/name") / "chat_template.jinja").unlink())
    assert resolve("owner/name") and calls[1:] == [["chat_template.jinja", COMMIT]]
    assert resolve("owner/name") and len(calls) == 2


def test_a_small_file_that_cannot_be_fetched(
    tmp_path: Path, online: Online, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a network a run goes on with what is enough for it and says so; without a tokenizer it ends.

    Nothing is taken for known not to exist, and nobody waits for the network twice.
    """

    def no_network(file: str) -> None:
        raise LocalEntryNotFoundError("no network\nmore")

    snapshot = cache_up(tmp_path, "owner/name")
    for file in ("generation_config.json", "chat_template.jinja"):
        (snapshot / file).unlink()
    calls = online(never, no_network)
    assert resolve("owner/name") == snapshot and calls == [["generation_config.json", COMMIT]]
    said = "epmoe: no generation_config.json of owner/name, its download failed (no network)"
    assert capsys.readouterr().err == f"{said}; HF_HUB_OFFLINE=1 does not try\n"
    (snapshot / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"name: tokenizer.json is not in .* failed \(no network\)") as caught:
        resolve("owner/name")
    assert "\n" not in str(caught.value) and capsys.readouterr().err == ""
    online(never)
    with pytest.raises(UserError, match=r"tokenizer.json is not in the local cache .* nor on the Hub"):
        resolve("owner/name")


def test_who_waited_for_a_failed_fetch_does_not_try_again(
    tmp_path: Path, online: Online, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else every rank of a node would wait for a silent network in turn."""
    waiting, held = threading.Barrier(4), fcntl.flock

    def flock(file: int, how: int) -> None:
        """Each comes to the lock before anybody has done with it."""
        try:
            held(file, how)
        except BlockingIOError:
            if threading.get_ident() not in waited:
                waited.add(threading.get_ident())
                waiting.wait(60)
            raise

    def no_network(file: str) -> None:
        waiting.wait(60)
        raise ConnectionResetError

    waited = set[int]()
    monkeypatch.setattr(fcntl, "flock", flock)

    (cache_up(tmp_path, "owner/name") / "chat_template.jinja").unlink()
    calls = online(never, no_network)
    with ThreadPoolExecutor(4) as pool:
        assert len({job.result() for job in [pool.submit(resolve, "owner/name") for _ in range(4)]}) == 1
    assert len(calls) == 1


def test_a_cache_that_is_only_read_serves_what_is_enough(
    tmp_path: Path, online: Online, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = cache_up(tmp_path, "owner/name")
    (snapshot / "chat_template.jinja").unlink()
    calls = online(never)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert resolve("owner/name") == snapshot and calls == []


def test_processes_of_a_node_download_once(tmp_path: Path, online: Online, capsys: pytest.CaptureFixture[str]) -> None:
    """The lock is the system's, by open file, so threads stand for processes here."""

    def download() -> None:
        time.sleep(0.5)
        cache_up(tmp_path, "owner/name")

    calls = online(download)
    with ThreadPoolExecutor(4) as pool:
        paths = {job.result() for job in [pool.submit(resolve, "owner/name") for _ in range(4)]}
    assert len(paths) == 1 and Checkpoint.open(paths.pop()).config["model_type"] == "gpt_oss"
    assert len(calls) == 1 and capsys.readouterr().err.count("downloading owner/name") == 1
    assert resolve("owner/name") and len(calls) == 1  # from the cache afterwards


def test_only_what_is_needed_is_downloaded(tmp_path: Path, online: Online) -> None:
    from huggingface_hub.utils import filter_repo_objects

    calls = online(lambda: cache_up(tmp_path, "owner/name"))
    resolve("owner/name")
    [patterns] = calls
    published = [
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
        "special_tokens_map.json", "chat_template.json", "additional_chat_templates/tool_use.jinja",
        "model-00000-of-00002.safetensors", INDEX, "README.md", "LICENSE",
        "original/model.safetensors", "original/config.json", "metal/model.bin", ".gitattributes",
    ]  # fmt: skip
    assert list(filter_repo_objects(published, allow_patterns=patterns)) == published[:10]


def test_a_second_process_waits_no_longer_than_its_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    begin = time.monotonic()
    with (
        hub._one_per_node("owner/name"),
        pytest.raises(UserError, match=r"another process holds .*owner--name.lock"),
        hub._one_per_node("owner/name", wait_s=0.3),
    ):
        pass
    assert 0.3 <= time.monotonic() - begin < 30
    with hub._one_per_node("owner/name", wait_s=0.0):
        pass  # free again


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (LocalEntryNotFoundError("cannot reach"), "is not in the local cache .* the Hub cannot be reached"),
        (OSError("No space left on device\nmore"), "failed .No space left on device.: run again"),
        (ConnectionResetError(), "failed .ConnectionResetError.: run again"),
        (RuntimeError("chunk\nmore"), "failed .chunk.: run again"),  # of the library that moves the bytes
        (KeyError("sha"), "failed .'sha'.: run again"),
        (BaseException("index out of bounds"), "the Hub's library failed .index out of bounds.: give a directory"),
    ],
)
def test_a_failed_download_is_one_line(error: BaseException, says: str, online: Online) -> None:
    def download() -> None:
        raise error

    online(download)
    with pytest.raises(UserError, match=says) as caught:
        resolve("owner/name")
    assert "\n" not in str(caught.value)


def test_a_cache_that_the_library_cannot_read(tmp_path: Path, online: Online, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it raises on the way, a user's interrupt aside."""
    online(lambda: None)
    interrupt = KeyboardInterrupt()
    for raised in (ValueError("a bad ref"), PermissionError("refs/main"), BaseException("panic"), interrupt):

        def broken(*_: object, error: BaseException = raised, **__: object) -> None:
            raise error

        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", broken)
        with pytest.raises(KeyboardInterrupt if raised is interrupt else UserError) as caught:
            resolve("owner/name")
        says = "" if raised is interrupt else f"checkpoint=owner/name: the Hub's library failed ({raised}): give a "
        assert str(caught.value).startswith(says)


def test_a_small_file_whose_fetch_fails_in_any_way(
    tmp_path: Path, online: Online, capsys: pytest.CaptureFixture[str]
) -> None:
    def breaks(file: str) -> None:
        raise RuntimeError("a chunk is missing")

    snapshot = cache_up(tmp_path, "owner/name")
    (snapshot / "chat_template.jinja").unlink()
    online(never, breaks)
    assert resolve("owner/name") == snapshot
    assert "no chat_template.jinja of owner/name, its download failed (a chunk is missing)" in capsys.readouterr().err


def test_a_repository_without_weights(tmp_path: Path, online: Online) -> None:
    online(lambda: (cache_up(tmp_path, "owner/name") / "model.safetensors").unlink())
    with pytest.raises(UserError, match=r"has no config.json or no safetensors weights"):
        resolve("owner/name")


def test_a_cache_that_cannot_be_written(tmp_path: Path, online: Online) -> None:
    online(lambda: None)
    (tmp_path / ".locks").write_text("in the way")
    with pytest.raises(UserError, match=r"cache cannot be written .*set HF_HOME"):
        resolve("owner/name")
