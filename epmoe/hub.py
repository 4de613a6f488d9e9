"""The `checkpoint` key → a directory on this machine: as given, from the local cache, or from the Hugging Face Hub.

One process of a node downloads and the others wait for it: a lock on a file in the cache, which the system takes from a
process that dies. Whoever gets it next finds the files there.
"""

import fcntl
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from epmoe.checkpoint import INDEX, SINGLE
from epmoe.errors import UserError

DEMO = Path(__file__).parent / "demo"
# The root of a repository only: gpt-oss carries the same weights twice more, in original/ and metal/.
FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    INDEX,
    "model*.safetensors",
)
# A snapshot in the cache does without the rest.
NEEDED = ("config.json", "tokenizer.json", INDEX, "model*.safetensors")
WAIT_S = 6 * 3600.0  # 65 GB at 3 MB/s


def resolve(checkpoint: str) -> Path:
    """The directory of `checkpoint`: a path, a Hub id `owner/name`, or the model that ships with epmoe ("").

    Every process of a node may call it at the same time; one of them downloads.

    Raises:
        UserError: neither; or a Hub id that is not in the local cache and cannot be fetched.
    """
    if not checkpoint:
        return DEMO
    path = Path(os.path.expanduser(checkpoint))  # Path's own raises for an unknown user, its exists for a long name
    if os.path.exists(path):
        return path  # that it is a good checkpoint is for Checkpoint.open to say
    if not _is_hub_id(checkpoint):
        raise UserError(f"checkpoint={checkpoint} is no directory on this machine and no Hub id of the form owner/name")
    found = _cached(checkpoint)
    if found is not None:
        return found
    with _one_per_node(checkpoint):
        return _cached(checkpoint) or _download(checkpoint)


def _is_hub_id(name: str) -> bool:
    """Whether the Hub would accept `name` as owner/name (it also knows names without an owner; models have one)."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def _cached(name: str) -> Path | None:
    """The snapshot in the local cache, when it is complete."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        found = snapshot_download(name, local_files_only=True, allow_patterns=list(NEEDED))
    except LocalEntryNotFoundError:
        return None
    return Path(found) if is_complete(Path(found)) else None


def is_complete(path: Path) -> bool:
    """Whether config.json and all weight files are there; a download that was cut off leaves some out."""
    if not (path / "config.json").exists():
        return False
    if (path / SINGLE).exists():
        return True
    try:
        shards = set(json.loads((path / INDEX).read_bytes())["weight_map"].values())
    except FileNotFoundError:
        return False
    except (ValueError, KeyError, AttributeError):
        return True  # as it came; Checkpoint.open says what is wrong with it
    return all((path / shard).exists() for shard in shards)


def _download(name: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, HTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise UserError(
            f"checkpoint={name} is not in the local cache {huggingface_hub.constants.HF_HUB_CACHE}, and "
            f"HF_HUB_OFFLINE is set: unset it, or give a directory"
        )
    print(f"epmoe: downloading {name}", file=sys.stderr)
    try:
        path = Path(huggingface_hub.snapshot_download(name, allow_patterns=list(FILES)))
    except GatedRepoError as error:
        raise UserError(f"checkpoint={name} is gated: accept its terms on the Hub and set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"checkpoint={name} is not on the Hub, or private: check the name, or set HF_TOKEN") from error
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"checkpoint={name} is not in the local cache {huggingface_hub.constants.HF_HUB_CACHE} and the Hub cannot "
            f"be reached: give a directory, or download it where there is a network"
        ) from error
    except (OSError, HTTPError) as error:  # the network or the disk, half-way
        what = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"the download of checkpoint={name} failed ({what[0]}): run again, it continues") from error
    if not is_complete(path):
        raise UserError(f"checkpoint={name} on the Hub has no config.json or no safetensors weights")
    return path


@contextmanager
def _one_per_node(name: str, wait_s: float = WAIT_S) -> Iterator[None]:
    """Hold the lock of this checkpoint's download; says so while another process holds it."""
    from huggingface_hub import constants

    file = Path(constants.HF_HUB_CACHE) / ".locks" / f"epmoe--{name.replace('/', '--')}.lock"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(
            f"the Hub's cache cannot be written ({file}: {error.strerror}): set HF_HOME to a directory that can"
        ) from error
    deadline = time.monotonic() + wait_s
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"another process holds {file} for {wait_s:.0f} s: end it, then run again"
                    ) from None
                time.sleep(0.2)
        yield
    finally:
        os.close(fd)  # releases the lock
