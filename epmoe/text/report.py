"""The closing line of a run: what it took, over all ranks."""

from collections.abc import Sequence

from epmoe.engine.request import Request, Result
from epmoe.ranks.memory import peak_bytes
from epmoe.ranks.mesh import Ranks


def closing_line(results: Sequence[Result], ready_s: float, bytes_read: int, ranks: Ranks, *, before: int = 0) -> str:
    """What the run took, over all ranks; a collective. `before` answers were there already.

    Generation began `ready_s` seconds after this rank's program: imports, loading, compiling and capturing come before.
    """
    values = ranks.gather_all([bytes_read, peak_bytes(ranks.device)])
    tokens = sum(len(result.ids) for result in results)
    seconds = max(result.total_s for result in results)
    first = min((result.first_token_s for result in results if result.ids), default=None)
    came = "" if first is None else f"first token after {first:.3f} s ({ready_s + first:.2f} s from the start); "
    each = "each " if len(values) > 1 else ""
    return (
        f"epmoe: {tokens} tokens in {seconds:.2f} s, {tokens / seconds:.1f} tokens/s, {came}"
        f"{len(values)} rank{'s' if len(values) > 1 else ''}, {each}read {_span([read for read, _ in values])} "
        f"and used {_span([used for _, used in values])} of memory at the peak{_known(before)}"
    )


def cut(requests: Sequence[Request], results: Sequence[Result], reasons: Sequence[str]) -> str:
    """The end of the closing line: how many answers did not end by themselves, and what cut them; "" if none was.

    `reasons` are the answers' finish reasons, which know of a stop string that came with the last token.
    """
    limits = [request.params.max_new_tokens for request in requests]
    lengths = [
        (len(result.ids), limit)
        for result, limit, reason in zip(results, limits, reasons, strict=True)
        if reason == "length" and limit  # 0: no answer was asked for
    ]
    by = {limit for length, limit in lengths if length == limit}
    few = sum(length == limit for length, limit in lengths)
    value = f"={by.pop()}" if len(by) == 1 else ""
    said = [
        (few, f"cut by max_new_tokens{value}"),
        (len(lengths) - few, "cut at the last of the model's positions"),
    ]
    return "".join(f"; {_answers(count, len(results))} {what}" for count, what in said if count)


def _answers(count: int, total: int) -> str:
    """The beginning of a sentence about so many of all answers."""
    if count == total:
        return "the answer was" if total == 1 else f"all {total} answers were"
    return f"{count} of {total} answers {'was' if count == 1 else 'were'}"


def _known(before: int) -> str:
    return f"; {before} answer{'s were' if before > 1 else ' was'} there already" if before else ""


def _span(values: Sequence[int]) -> str:
    """The least and the most, in megabytes of 10^6 bytes."""
    least, most = (f"{value / 1e6:,.1f}" for value in (min(values), max(values)))
    return f"{most} MB" if least == most else f"{least} to {most} MB"
