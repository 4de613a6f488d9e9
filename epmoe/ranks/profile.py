"""The trace of a rank: runtime.profile=DIR writes DIR/rank-N.json, with the names of epmoe/trace.py in it.

The files open in chrome://tracing or ui.perfetto.dev; on an accelerator a name spans the kernels launched under it too.
A CUDA graph replays kernels alone, so runtime.graphs=false is what shows the names of a decode step's parts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from epmoe.errors import UserError
from epmoe.ranks.mesh import Ranks


@contextmanager
def profiled(folder: str, ranks: Ranks) -> Iterator[None]:
    """Record what runs within; afterwards every rank writes `folder`/rank-N.json. An empty `folder` records nothing.

    Raises:
        UserError: the folder cannot be made or written.
    """
    if not folder:
        yield
        return
    file = Path(folder).expanduser() / f"rank-{ranks.rank}.json"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()  # a mistake shows before the run, not after it
    except OSError as error:
        raise UserError(
            f"runtime.profile={folder} cannot be written ({error.strerror}): choose another place"
        ) from error
    with profile(activities=activities(ranks.device)) as recorder:
        yield
        if ranks.device.type != "cpu":
            torch.accelerator.synchronize(ranks.device)
    recorder.export_chrome_trace(str(file))


def activities(device: torch.device) -> list[ProfilerActivity]:
    """What is recorded: the host, and the device's kernels where it is another one."""
    # By attribute: up to torch 2.13 the type is pybind11's, which has no [].
    return [getattr(ProfilerActivity, name) for name in dict.fromkeys(("CPU", device.type.upper()))]
