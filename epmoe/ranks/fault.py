"""Why a run ends, or loses some of its ranks: what happened to which rank, who says it, and every rank's exit code."""

from dataclasses import dataclass

from epmoe.errors import UserError

# The likeliest cause first. "port": two runs came to one MASTER_PORT, so nobody knows whose rank 0 is. "told": rank 0's
# own mistake from before the ranks met, which it has said at once.
KINDS = ("interrupt", "closed", "port", "lost", "told", "mistake", "error", "term")
SETTLE_S = 0.5  # a peer's EOF, its neighbours' errors and the agent's SIGTERM (within 0.1 s) all fall into this window


@dataclass(frozen=True)
class Fault:
    """Why the run ends: what happened to `rank`, and every rank's exit code."""

    kind: str  # one of KINDS
    rank: int
    text: str
    code: int

    def loss(self, unit: frozenset[int]) -> str:
        """What rank 0 prints where only these ranks end."""
        ranks = f"rank {min(unit)}" if len(unit) == 1 else f"ranks {', '.join(str(each) for each in sorted(unit))}"
        text = f"{'' if self.kind == 'lost' else ':'} {self.text}"
        return f"epmoe: rank {self.rank}{text}; the others go on without {ranks}\n"

    def line(self, reader: int) -> str:
        """What rank `reader` prints: a lost rank is named by everyone, all else is said once, by rank 0.

        A port that two runs came to is named by everyone, too: rank 0 may be another user's.
        """
        if self.kind == "lost":
            return f"epmoe: rank {self.rank} {self.text}; rank {reader} ends too\n"
        if self.kind == "port":
            return f"epmoe: error: {self.text}\n"
        if reader != 0 or self.kind in ("closed", "told"):
            return ""
        error = "error: " if self.kind == "mistake" else ""
        whose = f"rank {self.rank}: " if self.rank != 0 and self.kind != "interrupt" else ""
        return f"epmoe: {error}{whose}{self.text}\n"


class NoRankZero(UserError):
    """Rank 0 cannot be reached, or is another run's, so that whoever finds it says it."""


class SharedMistake(UserError):
    """What every rank finds for certain, as a launcher started all alike: rank 0 alone says it, and asks nobody."""
