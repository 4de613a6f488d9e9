"""The `checkpoint` key → a directory on this machine: as given, from the local cache, or from the Hugging Face Hub.

One process of a node downloads and the others wait for it: a lock on a file in the cache, which the system takes from a
process that dies. Whoever gets it next finds the files there.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from epmoe import strictjson
from epmoe.errors import UserError
from epmoe.streams import tell
from epmoe.weights.checkpoint import INDEX, SINGLE, WHOLE

DEMO = Path(__file__).resolve().parents[1] / "demo"
TOKENIZER = "tokenizer.json"
# What a repository may do without; what a snapshot in the cache lacks of them is fetched as well.
OPTIONAL = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
# Of older or rarer repositories: they come with a download, and are not asked for one by one.
RARE = ("chat_template.json", "additional_chat_templates/*.jinja")
# The root of a repository only: gpt-oss carries the same weights twice more, in original/ and metal/.
FILES = ("config.json", TOKENIZER, *OPTIONAL, *RARE, INDEX, "model*.safetensors")
WAIT_S = 6 * 3600.0  # 65 GB at 3 MB/s


def resolve_draft_model(name: str) -> Path:
    """As `resolve`, of the key `draft_model`."""
    try:
        return resolve(name)
    except UserError as error:
        raise UserError(str(error).replace(f"checkpoint={name}", f"draft_model={name}")) from None


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
    with _wrapped(checkpoint):
        return _resolved(checkpoint)


def _resolved(checkpoint: str) -> Path:
    """The directory of a Hub id."""
    found = _snapshot(checkpoint)
    if found is not None and not missing(found) and not _unknown(checkpoint, found):
        return found
    with _one_per_node(checkpoint) as waited:
        found = _snapshot(checkpoint)
        if found is None or missing(found, weights_only=True):
            found = _download(checkpoint, found)
        elif waited and not missing(found):
            return found  # what is missing still, the process before this one could not fetch either
        _fetch_small(checkpoint, found)
        return found


@contextmanager
def _wrapped(name: str) -> Iterator[None]:
    """Whatever the library raises that nobody within has an answer to: it has its own errors, those of what it stands
    on (the network, locks, JSON), and panics of Rust, which are no Exception.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise UserError(
            f"checkpoint={name}: the Hub's library failed ({_first_line(error)}): "
            "give a directory, or clear its folder in the cache"
        ) from error


def _is_hub_id(name: str) -> bool:
    """Whether the Hub would accept `name` as owner/name (it also knows names without an owner; models have one)."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def _snapshot(name: str) -> Path | None:
    """The snapshot in the local cache, complete or not."""
    from huggingface_hub import try_to_load_from_cache

    for file in ("config.json", TOKENIZER, INDEX, SINGLE):
        found = try_to_load_from_cache(name, file)
        if isinstance(found, str):
            return Path(found).parent
    return None


def missing(path: Path, *, weights_only: bool = False) -> list[str]:
    """The files without which nothing runs and which are not there; a download that was cut off leaves some out.

    `weights_only` asks for config.json and the weights, and not for the tokenizer.
    """
    small = ("config.json",) if weights_only else ("config.json", TOKENIZER)
    absent = [name for name in small if not (path / name).exists()]
    if (path / SINGLE).exists() or (path / WHOLE).exists():
        return absent
    try:
        shards = set(strictjson.loads((path / INDEX).read_bytes())["weight_map"].values())
    except FileNotFoundError:
        return [*absent, SINGLE]
    except (ValueError, KeyError, AttributeError):
        return absent  # as it came; Checkpoint.open says what is wrong with it
    return [*absent, *sorted(shard for shard in shards if not (path / shard).exists())]


def _unknown(name: str, path: Path) -> list[str]:
    """The small files that the snapshot lacks though the repository may have them; none where nothing can be fetched.

    huggingface_hub leaves a mark in its cache for a file that a commit turned out not to have.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    writable = all(os.access(folder, os.W_OK) for folder in (constants.HF_HUB_CACHE, path))
    if constants.HF_HUB_OFFLINE or not writable:
        return []
    small = (TOKENIZER, *OPTIONAL)
    return [file for file in small if try_to_load_from_cache(name, file, revision=path.name) is None]


def _fetch_small(name: str, path: Path) -> None:
    """Fetch the small files that the snapshot lacks, of its own commit: `main` may have moved on to other weights.

    Raises:
        UserError: there is no tokenizer.json in the end. Without the others a run goes on, and one line says so.
    """
    from huggingface_hub import constants

    offline = bool(constants.HF_HUB_OFFLINE)
    why = "and HF_HUB_OFFLINE is set: unset it, or give a directory" if offline else "nor on the Hub: give a directory"
    for file in _unknown(name, path):
        if failure := _fetch(name, file, path.name):
            why = f"and its download failed ({failure}): run again, or give a directory"
            if not missing(path):
                hint = "HF_HUB_OFFLINE=1 does not try"
                tell(f"epmoe: no {file} of {name}, its download failed ({failure}); {hint}")
            break  # the next one would wait for the network just as long
    if absent := missing(path):
        raise UserError(f"checkpoint={name}: {_shown(absent)} is not in the local cache {path}, {why}")


def _fetch(name: str, file: str, commit: str) -> str:
    """Download one file, if the repository has it; why it failed, else ""."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        hf_hub_download(name, file, revision=commit)
    except LocalEntryNotFoundError as error:  # no network; before the next one, of which it is a kind
        return _first_line(error)
    except EntryNotFoundError:
        pass  # the library has left its mark
    except Exception as error:  # the network's, the disk's, the library's own: a run may go on without
        return _first_line(error)
    return ""


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _shown(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _download(name: str, found: Path | None) -> Path:
    """The snapshot of `main`, downloaded as far as it is not there; `found` is an incomplete one."""
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    cache = huggingface_hub.constants.HF_HUB_CACHE
    lacks = f"is not in the local cache {cache}"
    if found is not None:
        lacks = f"is not complete in the local cache {cache} (missing: {_shown(missing(found))})"
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise UserError(f"checkpoint={name} {lacks}, and HF_HUB_OFFLINE is set: unset it, or give a directory")
    tell(f"epmoe: downloading {name}")
    try:
        path = Path(huggingface_hub.snapshot_download(name, allow_patterns=list(FILES)))
    except GatedRepoError as error:
        raise UserError(f"checkpoint={name} is gated: accept its terms on the Hub and set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"checkpoint={name} is not on the Hub, or private: check the name, or set HF_TOKEN") from error
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"checkpoint={name} {lacks} and the Hub cannot be reached: "
            "give a directory, or download it where there is a network"
        ) from error
    except Exception as error:  # the network or the disk, half-way
        raise UserError(
            f"the download of checkpoint={name} failed ({_first_line(error)}): run again, it continues"
        ) from error
    if missing(path, weights_only=True):
        raise UserError(f"checkpoint={name} on the Hub has no config.json or no safetensors weights")
    return path


@contextmanager
def _one_per_node(name: str, wait_s: float = WAIT_S) -> Iterator[bool]:
    """Hold the lock of this checkpoint's download; yields whether another process held it until now."""
    from huggingface_hub import constants

    file = Path(constants.HF_HUB_CACHE) / ".locks" / f"epmoe--{name.replace('/', '--')}.lock"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(
            f"the Hub's cache cannot be written ({file}: {error.strerror}): set HF_HOME to a directory that can"
        ) from error
    deadline, waited = time.monotonic() + wait_s, False
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                waited = True
                if time.monotonic() > deadline:
                    raise UserError(
                        f"another process holds {file} for {wait_s:.0f} s: end it, then run again"
                    ) from None
                time.sleep(0.2)
        yield waited
    finally:
        os.close(fd)  # releases the lock
