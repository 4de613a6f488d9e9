"""Why a run ends: what happened to which rank, who says it, and every rank's exit code."""

from dataclasses import dataclass

from epmoe.errors import UserError

# The likeliest cause first. "port": two runs came to one MASTER_PORT, so nobody knows whose rank 0 is.
KINDS = ("interrupt", "closed", "port", "lost", "mistake", "error", "term")


@dataclass(frozen=True)
class Fault:
    """Why the run ends: what happened to `rank`, and every rank's exit code."""

    kind: str  # one of KINDS
    rank: int
    text: str
    code: int

    def line(self, reader: int) -> str:
        """What rank `reader` prints: a lost rank is named by everyone, all else is said once, by rank 0.

        A port that two runs came to is named by everyone, too: rank 0 may be another user's.
        """
        if self.kind == "lost":
            return f"epmoe: rank {self.rank} {self.text}; rank {reader} ends too\n"
        if self.kind == "port":
            return f"epmoe: error: {self.text}\n"
        if reader != 0 or self.kind == "closed":
            return ""
        error = "error: " if self.kind == "mistake" else ""
        whose = f"rank {self.rank}: " if self.rank != 0 and self.kind != "interrupt" else ""
        return f"epmoe: {error}{whose}{self.text}\n"


class NoRankZero(UserError):
    """Rank 0 cannot be reached, or is another run's, so that whoever finds it says it."""
