"""Lines of a file of answers, as an earlier run has left them → which answers are there, and where each line lies.

What a line must have to be taken over: `index`, `request` (the digest of what was asked), `ids` and `finish_reason`.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from epmoe import strictjson
from epmoe.engine.request import Request
from epmoe.errors import UserError

BEGIN = b'{"index": '  # of each line
FINAL = ("eos", "stop", "length")  # finish reasons of answers; others are computed again


class Place(NamedTuple):
    """Where a line lies in its file, in bytes, its newline included."""

    begin: int
    size: int


def request_digest(request: Request, model: Any) -> str:
    """16 hex digits of what an answer follows from: ids, parameters, and `model`, anything that JSON can hold."""
    asked = [list(request.ids), asdict(request.params), model]
    return hashlib.sha256(strictjson.dumps(asked).encode()).hexdigest()[:16]


def recorded(file: BinaryIO, path: Path, digests: Sequence[str], *, torn: bool) -> tuple[dict[int, Place], int]:
    """The final answers of a file by their index, and the bytes of its whole lines.

    Args:
        digests: of the requests, by index.
        torn: whether the last line may lack its end, as of a process that was killed; it counts as absent.
    Raises:
        UserError: a line that is damaged, or answers another request; with its number.
        OSError: the file cannot be read.
    """
    found: dict[int, Place] = {}
    begin = 0
    file.seek(0)
    for number, line in enumerate(file, 1):
        if torn and not line.endswith(b"\n") and _begun(line):
            break
        index = _judged(line, f"{path}:{number}", digests)
        if index is not None:
            found[index] = Place(begin, len(line))
        begin += len(line)
    return found, begin


def _begun(line: bytes) -> bool:
    """Whether a line may be the beginning of one of ours; where a machine went down, the rest may be zeros."""
    return line[: len(BEGIN)] == BEGIN[: len(line)] or not line.strip(b"\0")


def _judged(line: bytes, origin: str, digests: Sequence[str]) -> int | None:
    """The index of the request that a line answers; None where it is to be computed again."""
    try:
        answer = strictjson.loads(line)
    except ValueError as error:
        raise UserError(f"{origin}: not JSON ({error}): mend the line or remove it") from error
    match answer:
        case {"index": int(index), "request": str(request), "ids": list(), "finish_reason": str(reason)} if (
            not isinstance(index, bool)
        ):
            pass
        case _:
            raise UserError(f"{origin} is no line that resume=true can go on from: mend it or remove it")
    remedy = "give what that run was given, or another output="
    if not 0 <= index < len(digests):
        raise UserError(f"{origin} answers prompt {index + 1}, and there are {len(digests)} prompts: {remedy}")
    if request != digests[index]:
        raise UserError(
            f"{origin} answers another prompt {index + 1}, or one with other sampling or of another model: {remedy}"
        )
    return index if reason in FINAL else None
