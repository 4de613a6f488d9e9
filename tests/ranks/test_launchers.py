"""Launchers: tasks of Slurm, MPI and others are ranks, and only where there are several of them."""

from dataclasses import dataclass

import pytest

from epmoe.ranks.launchers import Task, adopt, find

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"}
TWO_NODES = {
    **STEP,
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
MPIRUN = {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4"}
ONE_NODE = {**MPIRUN, "OMPI_COMM_WORLD_LOCAL_RANK": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}


@dataclass(frozen=True)
class Case:
    """What a process finds in its environment, and what TORCHRUN's variables are then; "": not set."""

    name: str
    given: dict[str, str]
    expected: tuple[str, str, str, str, str] = ("", "", "", "", "")


CASES = [
    Case("nothing", {}),
    Case("a step on one node", {**STEP, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "4"},
         ("0", "4", "0", "4", "127.0.0.1")),
    Case("a step on two nodes", TWO_NODES, ("3", "4", "1", "2", "")),
    Case("... whose address is known", {**TWO_NODES, "MASTER_ADDR": "n0"}, ("3", "4", "1", "2", "n0")),
    Case("uneven nodes", {**TWO_NODES, "SLURM_STEP_TASKS_PER_NODE": "3,1", "SLURM_LOCALID": "0"},
         ("3", "4", "0", "1", "")),
    Case("a step of one task in a job of four", {**STEP, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}),
    Case("a batch script", {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_NODEID": "0"}),
    Case("an interactive step", {**STEP, "SLURM_PROCID": "0", "SLURM_STEP_ID": "4294967290"}),
    Case("an old Slurm's second task", {"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, ("1", "2", "", "", "")),
    Case("mpirun on one node", ONE_NODE, ("2", "4", "2", "4", "127.0.0.1")),
    Case("mpirun that says no node", MPIRUN, ("2", "4", "", "", "")),
    Case("mpirun whose daemons are a step", {**TWO_NODES, **ONE_NODE}, ("2", "4", "2", "4", "127.0.0.1")),
    Case("MPICH", {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "1"},
         ("1", "2", "0", "1", "")),
    Case("srun --mpi=pmi2: Slurm knows the node", {**TWO_NODES, "PMI_RANK": "3", "PMI_SIZE": "4"},
         ("3", "4", "1", "2", "")),
    Case("mpirun of one", {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}),
    Case("torchrun in a step", {**TWO_NODES, "RANK": "5", "WORLD_SIZE": "8"}, ("5", "8", "", "", "")),
    Case("a run of its own in each task", {**ONE_NODE, "RANK": "0", "WORLD_SIZE": "1"}, ("0", "1", "", "", "")),
    Case("no numbers", {"OMPI_COMM_WORLD_RANK": "", "OMPI_COMM_WORLD_SIZE": "many"}),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_numbers_become_torchruns(case: Case) -> None:
    environment = dict(case.given)
    adopt(environment)
    assert tuple(environment.get(name, "") for name in TORCHRUN) == case.expected
    again = dict(environment)
    adopt(again)
    assert again == environment


def test_a_task_says_which_variables_it_is_known_by() -> None:
    assert find(TWO_NODES) == Task(3, 4, 1, 2, ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"))
    assert find({**TWO_NODES, **MPIRUN}) == Task(2, 4, None, None, ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"))
