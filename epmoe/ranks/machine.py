"""What ranks must have in common besides their settings: the code that runs, and the kind of device.

Each rank runs attention and the router itself, so all must come to the same bits: a rank whose products round otherwise
chooses another expert where two are close, and a slot then has two owners or none. That is wrong text, so another
release or another kind of device is refused, and not only warned of.
"""

import hashlib
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGE = Path(__file__).parents[1]


def machine(device: torch.device) -> Mapping[str, str]:
    """The releases and the kind of device on which a rank's bits depend, by name."""
    return {
        "epmoe": f"sources {_sources()}",
        "torch": torch.__version__,
        "triton": _release("triton"),
        "device": _kind(device),
    }


def _release(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _sources() -> str:
    """A digest of the package's Python files: a node's checkout may be an older one of the same release."""
    digest = hashlib.sha256()
    for folder, folders, names in os.walk(PACKAGE):
        folders.sort()
        for name in sorted(names):
            if name.endswith(".py"):
                file = Path(folder, name)
                digest.update(file.relative_to(PACKAGE).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:8]


def _kind(device: torch.device) -> str:
    """The model of an accelerator; of a CPU what torch's products choose their instructions by."""
    if device.type == "cpu":
        return f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return str(torch.get_device_module(device).get_device_name(device))
