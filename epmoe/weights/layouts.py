"""What people point at that is no checkpoint, though it looks like one: what it is, and what to do. Nothing else.

a git-lfs pointer in a file's place · a LoRA adapter · original/, OpenAI's own layout · GGUF · experts one by one
"""

import re
from collections.abc import Collection
from pathlib import Path

from epmoe import strictjson

_POINTER = b"version https://git-lfs.github.com/spec/"


def is_pointer(data: bytes) -> bool:
    """Whether a file that begins so was cloned without git-lfs: a few lines that name the real one."""
    return data.startswith(_POINTER)


POINTER = "is a git-lfs pointer, not the file itself: run git lfs pull, or download it again"


def adapter(path: Path) -> str:
    """What to say of a directory that holds a LoRA adapter; "" where it holds none."""
    if not (path / "adapter_config.json").is_file():
        return ""
    try:
        base = strictjson.loads((path / "adapter_config.json").read_bytes())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = "its base model"
    return f"holds a LoRA adapter (adapter_config.json), which is not applied: merge it into {base} and give the result"


def without_config(path: Path) -> str:
    """What to say of a directory that has no config.json."""
    if said := adapter(path):
        return said
    if (path / "original" / "config.json").is_file():
        return "has no config.json but original/, OpenAI's own layout: download the files beside original/ as well"
    if ggufs := sorted(file.name for file in path.glob("*.gguf")):
        return f"holds {ggufs[0]}, a GGUF file, which is not read: download the safetensors of the model"
    return "has no config.json: it is no Hugging Face checkpoint directory"


def is_original(tensors: Collection[str]) -> bool:
    """Whether the tensors have the names of OpenAI's own layout (the folder original/ of a repository)."""
    return any(name.startswith("block.") for name in tensors)


ORIGINAL = "is OpenAI's own layout (a repository's folder original/): give the folder above it, and its files"


def one_by_one(names: Collection[str]) -> str:
    """A tensor that holds a single expert; "" where there is none."""
    return next((name for name in names if re.search(r"\.experts\.\d+\.", name)), "")
