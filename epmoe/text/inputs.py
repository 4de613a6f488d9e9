"""What a run reads: `output` must not take the place of any of it."""

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

from epmoe.config.compose import conf_dir
from epmoe.config.schema import Config
from epmoe.errors import UserError
from epmoe.text.answers import UNFINISHED
from epmoe.weights.checkpoint import Checkpoint
from epmoe.weights.hub import FILES


def check_output_is_no_input(config: Config, checkpoint: Checkpoint) -> None:
    """Raises UserError where `output` names a file that this run reads, be it by another name or through a link."""
    if not config.output:
        return
    file = Path(os.path.realpath(os.path.expanduser(config.output)))
    for name, input in _inputs(config, checkpoint):
        for place, what in ((file, "is"), (file.with_name(f"{file.name}{UNFINISHED}"), "is written by way of")):
            if os.path.exists(place) and os.path.samestat(place.stat(), input):
                raise UserError(f"output={config.output} {what} {name}, which this run reads: choose another file")
    directory = os.path.realpath(checkpoint.path)
    for pattern in FILES:
        if file.is_relative_to(directory) and fnmatch(str(file.relative_to(directory)), pattern):
            raise UserError(f"output={config.output} has the name of a checkpoint's file: choose another file")


def _inputs(config: Config, checkpoint: Checkpoint) -> Iterator[tuple[str, os.stat_result]]:
    """What each file is, and which file it is."""
    for pattern in FILES:
        for file in checkpoint.path.glob(pattern):
            yield f"the checkpoint's {file.name}", file.stat()
    for file in checkpoint.files:
        yield f"the checkpoint's {file.name}", file.stat()
    if config.tools and os.path.exists(tools := os.path.expanduser(config.tools)):
        yield "the file of tools", os.stat(tools)
    for file in conf_dir().rglob("*.yaml"):
        yield f"the configuration's {file.name}", file.stat()
    if config.prompts == "-":
        # Where there is none, or what Python code has put in its place, nothing is read by that name.
        with suppress(OSError, ValueError, AttributeError):
            yield "standard input", os.fstat(sys.stdin.fileno())
    elif config.prompts and os.path.exists(prompts := os.path.expanduser(config.prompts)):
        yield "the file of prompts", os.stat(prompts)
