"""Launchers that number their tasks in variables of their own: Slurm's srun, MPI's mpirun and others.

N tasks of one of them would otherwise be N whole runs, each on the same device and with the same output file. So a task
takes its numbers as if torchrun had given them. Variables of torchrun's that are set hold: `RANK=0 WORLD_SIZE=1` makes
a run of each task.
"""

import re
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass

# What each calls a task's rank, the number of tasks, and both within the node. Those that start their daemons through
# Slurm stand before it: there Slurm's variables count daemons.
VARIABLES = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),
    ("JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_LOCAL_RANK", "JSM_NAMESPACE_LOCAL_SIZE"),
    ("FLUX_TASK_RANK", "FLUX_JOB_SIZE", "", ""),
)
SPECIAL_STEP = 0xFFFFFFF0  # Slurm's steps from here on are a batch script's or an interactive shell's one process


@dataclass(frozen=True)
class Task:
    """One of several tasks; `names` are the variables that say so. None: the launcher does not say it."""

    rank: int
    size: int
    local_rank: int | None
    local_size: int | None
    names: tuple[str, str]


def find(environment: Mapping[str, str]) -> Task | None:
    """Which task this process is; None: of no launcher that is known, or the only one."""
    tasks = [task for task in _tasks(environment) if task.size > 1]
    same = [task for task in tasks if (task.rank, task.size) == (tasks[0].rank, tasks[0].size)]
    return min(same, key=lambda task: task.local_size is None, default=None)


def adopt(environment: MutableMapping[str, str]) -> None:
    """Set torchrun's variables to what another launcher says, where none of them is set."""
    task = find(environment)
    if task is None or "RANK" in environment or "WORLD_SIZE" in environment:
        return
    environment.update({"RANK": str(task.rank), "WORLD_SIZE": str(task.size)})
    if task.local_rank is not None and task.local_size is not None:
        environment.update({"LOCAL_RANK": str(task.local_rank), "LOCAL_WORLD_SIZE": str(task.local_size)})
    if task.local_size == task.size:
        environment.setdefault("MASTER_ADDR", "127.0.0.1")


def _tasks(environment: Mapping[str, str]) -> Iterator[Task]:
    for names in VARIABLES:
        rank, size, local_rank, local_size = (_number(environment.get(name)) for name in names)
        if rank is not None and size is not None:
            yield Task(rank, size, local_rank, local_size, names[:2])
    rank, step = _number(environment.get("SLURM_PROCID")), _number(environment.get("SLURM_STEP_ID"))
    for name in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"):
        size = _number(environment.get(name))
        # A batch script is the one process of its step, though its job may be for several tasks.
        if rank is not None and size is not None and (rank > 0 or (step is not None and step < SPECIAL_STEP)):
            local_rank = _number(environment.get("SLURM_LOCALID"))
            yield Task(rank, size, local_rank, _slurm_local_size(environment), ("SLURM_PROCID", name))
            return


def _slurm_local_size(environment: Mapping[str, str]) -> int | None:
    """How many tasks of the step this node has: the NODEID-th number of a list such as 4(x2),3."""
    text = environment.get("SLURM_STEP_TASKS_PER_NODE", environment.get("SLURM_TASKS_PER_NODE", ""))
    counts = [
        int(each["tasks"])
        for each in re.finditer(r"(?P<tasks>\d+)(\(x(?P<times>\d+)\))?", text)
        for _ in range(int(each["times"] or 1))
    ]
    node = _number(environment.get("SLURM_NODEID", "0"))
    return counts[node] if node is not None and node < len(counts) else None


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and re.fullmatch(r"[0-9]{1,10}", text) else None
