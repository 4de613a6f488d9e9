"""Whole tensors of safetensors files → memory of the host, by the library.

What it reads here takes about as long as with our own calls (scripts/bench/load.py has all ways, on any device). The
rest is `reader.py`'s:

    rows of a tensor    with backend="pread" the library reads the whole tensor for a slice of it (0.8.0: 33 MB for
                        2 MB of one), with "mmap" every page that it touches counts as this process's memory, and a file
                        that changes changes the model, or ends it
    an accelerator      several threads read while copies run: 13.8 GB in 1.07 s, where the library takes 1.92 (mapped)
                        and 2.78 (docs/measurements.md)

Headers are checked by `checkpoint.py` before anything of a file is used: the library says less of what is wrong.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from epmoe.errors import UserError


class Library:
    """Files that are open, and the bytes that were read. Not for use from several threads at once."""

    def __init__(self) -> None:
        self.bytes_read = 0
        self._files: dict[Path, Any] = {}

    def read(self, file: Path, name: str) -> torch.Tensor:
        """Tensor `name`, in memory of its own.

        Raises:
            UserError: the file cannot be opened, or is no longer what its header said.
        """
        try:
            if file not in self._files:
                self._files[file] = safe_open(file, framework="pt", backend="pread")
            found: torch.Tensor = self._files[file].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file}: {name} cannot be read ({error}): copy or download it again") from error
        self.bytes_read += found.nbytes
        return found

    def close(self) -> None:
        """Let go of the files; the next read opens them again."""
        self._files.clear()
