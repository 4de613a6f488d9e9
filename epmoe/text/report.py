"""The closing line of a run: what it took, over all ranks."""

from collections.abc import Sequence

from epmoe.engine.request import Result
from epmoe.ranks.memory import peak_bytes
from epmoe.ranks.mesh import Ranks


def closing_line(results: Sequence[Result], ready_s: float, bytes_read: int, ranks: Ranks, *, before: int = 0) -> str:
    """What the run took, over all ranks; a collective. `before` answers were there already.

    Generation began `ready_s` seconds after this rank's program: imports, loading, compiling and capturing come before.
    """
    values = ranks.gather([bytes_read, peak_bytes(ranks.device)])
    tokens = sum(len(result.ids) for result in results)
    seconds = max(result.total_s for result in results)
    first = min(result.first_token_s for result in results)
    each = "each " if len(values) > 1 else ""
    return (
        f"epmoe: {tokens} tokens in {seconds:.2f} s, {tokens / seconds:.1f} tokens/s, "
        f"first token after {first:.3f} s ({ready_s + first:.2f} s from the start); "
        f"{len(values)} rank{'s' if len(values) > 1 else ''}, {each}read {_span([read for read, _ in values])} "
        f"and used {_span([used for _, used in values])} of memory at the peak{_known(before)}"
    )


def _known(before: int) -> str:
    return f"; {before} answer{'s were' if before > 1 else ' was'} there already" if before else ""


def _span(values: Sequence[int]) -> str:
    """The least and the most, in megabytes of 10^6 bytes."""
    least, most = (f"{value / 1e6:,.1f}" for value in (min(values), max(values)))
    return f"{most} MB" if least == most else f"{least} to {most} MB"
