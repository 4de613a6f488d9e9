"""Axes: how the ranks are arranged, as R replicas of the model by N expert ranks each, which are neighbours.

    mesh.replica=2 mesh.expert=4      replica 0: ranks 0 1 2 3      replica 1: ranks 4 5 6 7

Letters: R replicas · N expert ranks of a replica.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from epmoe.errors import UserError


@dataclass(frozen=True)
class Axes:
    """R by N; rank = replica · N + expert rank."""

    replicas: int = 1
    expert: int = 1

    @classmethod
    def of(cls, size: int, replica: int, expert: int) -> "Axes":
        """Of so many ranks, as mesh.replica and mesh.expert ask for; 0 leaves it to the other one.

        Raises:
            UserError: no such arrangement has just so many ranks.
        """
        for name, value in (("replica", replica), ("expert", expert)):
            if value and size % value:
                fitting = ", ".join(str(each) for each in range(1, size + 1) if size % each == 0)
                raise UserError(
                    f"mesh.{name}={value} does not divide the number of ranks, {size}: take one of {fitting}, or "
                    "start other ranks"
                )
        found = cls(replica or size // (expert or size), expert or size // (replica or 1))
        if found.size != size:
            raise UserError(
                f"mesh.replica={replica} times mesh.expert={expert} is not the number of ranks, {size}: "
                "leave one of them at 0"
            )
        return found

    @property
    def size(self) -> int:
        return self.replicas * self.expert

    def members(self, replica: int) -> list[int]:
        """Its ranks, by expert rank."""
        return list(range(replica * self.expert, (replica + 1) * self.expert))

    def counterparts(self, expert_rank: int) -> list[int]:
        """The ranks of that expert rank, by replica."""
        return list(range(expert_rank, self.size, self.expert))

    def units(self, nodes: Sequence[str]) -> list[list[int]]:
        """Replicas that live and die together, since a node's launcher ends all of its ranks when it loses one.

        Args:
            nodes: each rank's, by rank: the same text for the same launcher on the same machine.
        """
        of_node: dict[str, int] = {}  # a node → the unit of the last replica that was seen there
        unit = list(range(self.replicas))  # by replica
        for replica in range(self.replicas):
            for rank in self.members(replica):
                other = of_node.setdefault(nodes[rank], unit[replica])
                unit = [other if each == unit[replica] else each for each in unit]
                of_node = {node: unit[each] for node, each in of_node.items()}
        return [[replica for replica in range(self.replicas) if unit[replica] == each] for each in sorted(set(unit))]
