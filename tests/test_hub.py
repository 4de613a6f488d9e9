"""Hub: a checkpoint is a directory, in the local cache, or downloaded once; what fails, fails with one line."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from epmoe import hub
from epmoe.checkpoint import INDEX, Checkpoint
from epmoe.errors import UserError
from epmoe.hub import resolve
from epmoe.synthetic import make_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cache_up(cache: Path, name: str, **spec: object) -> Path:
    """A checkpoint laid out as huggingface_hub's cache does: blobs, a ref, a snapshot of links."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot, blobs = repository / "snapshots" / COMMIT, repository / "blobs"
    for folder in (snapshot, blobs, repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    made = make_checkpoint(cache / "made", "tiny", **spec)
    for number, file in enumerate(sorted(made.iterdir())):
        shutil.move(file, blobs / f"{number:040x}")
        (snapshot / file.name).symlink_to(os.path.relpath(blobs / f"{number:040x}", snapshot))
    made.rmdir()
    return snapshot


def resolve_offline(cache: Path, *names: str) -> list[str]:
    """Each name's path or error, from a fresh process with HF_HUB_OFFLINE=1 and its cache in `cache`."""
    code = (
        "import sys, json\n"
        "from epmoe.hub import resolve\n"
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
    found = resolve_offline(tmp_path, "owner/whole", "owner/cut-off", "owner/no-weights", "owner/unknown")
    assert found[0] == str(whole) and len(Checkpoint.open(found[0]).files) == 2
    for name, line in zip(("owner/cut-off", "owner/no-weights", "owner/unknown"), found[1:], strict=True):
        assert line.startswith(f"error: checkpoint={name} is not in the local cache {tmp_path}") and "\n" not in line
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


@pytest.fixture
def online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[list[str]]]]:
    """Replaces the downloader by one that "downloads" by calling a function; gives the list of downloads' patterns."""

    def install(download: Callable[[], object]) -> list[list[str]]:
        calls: list[list[str]] = []

        def snapshot_download(name: str, *, allow_patterns: list[str], local_files_only: bool = False) -> str:
            target = tmp_path / "models--owner--name" / "snapshots" / COMMIT
            if local_files_only:
                if not target.exists():
                    raise LocalEntryNotFoundError("not cached")
            else:
                calls.append(allow_patterns)
                download()
            return str(target)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        return calls

    yield install


def test_processes_of_a_node_download_once(
    tmp_path: Path, online: Callable[..., list[list[str]]], capsys: pytest.CaptureFixture[str]
) -> None:
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


def test_only_what_is_needed_is_downloaded(tmp_path: Path, online: Callable[..., list[list[str]]]) -> None:
    from huggingface_hub.utils import filter_repo_objects

    calls = online(lambda: cache_up(tmp_path, "owner/name"))
    resolve("owner/name")
    [patterns] = calls
    published = [
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
        "model-00000-of-00002.safetensors", INDEX, "README.md", "LICENSE", "special_tokens_map.json",
        "original/model.safetensors", "original/config.json", "metal/model.bin", ".gitattributes",
    ]  # fmt: skip
    assert list(filter_repo_objects(published, allow_patterns=patterns)) == published[:7]


def test_a_second_process_waits_no_longer_than_its_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    begin = time.monotonic()
    with (
        hub._one_per_node("owner/name"),
        pytest.raises(UserError, match=r"another process holds .*owner--name.lock"),
        hub._one_per_node("owner/name", wait_s=0.3),
    ):
        pass
    assert 0.3 <= time.monotonic() - begin < 5
    with hub._one_per_node("owner/name", wait_s=0.0):
        pass  # free again


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (LocalEntryNotFoundError("cannot reach"), "is not in the local cache .* the Hub cannot be reached"),
        (OSError("No space left on device\nmore"), "failed .No space left on device.: run again"),
        (ConnectionResetError(), "failed .ConnectionResetError.: run again"),
    ],
)
def test_a_failed_download_is_one_line(error: Exception, says: str, online: Callable[..., list[list[str]]]) -> None:
    def download() -> None:
        raise error

    online(download)
    with pytest.raises(UserError, match=says) as caught:
        resolve("owner/name")
    assert "\n" not in str(caught.value)


def test_a_repository_without_weights(tmp_path: Path, online: Callable[..., list[list[str]]]) -> None:
    online(lambda: (cache_up(tmp_path, "owner/name") / "model.safetensors").unlink())
    with pytest.raises(UserError, match=r"has no config.json or no safetensors weights"):
        resolve("owner/name")


def test_a_cache_that_cannot_be_written(tmp_path: Path, online: Callable[..., list[list[str]]]) -> None:
    online(lambda: None)
    (tmp_path / ".locks").write_text("in the way")
    with pytest.raises(UserError, match=r"cache cannot be written .*set HF_HOME"):
        resolve("owner/name")
