"""JSON by its standard. Python's reader takes the last of two equal keys and reads NaN; its writer writes NaN."""

import gc
import json
from typing import Any, NoReturn


def loads(text: bytes | str) -> Any:
    """The value that a JSON text spells.

    Raises:
        ValueError: no JSON, a key that an object has twice, NaN or Infinity, nested too deeply, bytes that are no text.
    """
    collects = gc.isenabled()
    gc.disable()  # it would look through what was made so far again and again: half the time of a large vocabulary
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_no_number)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    finally:
        if collects:
            gc.enable()


def dumps(value: Any) -> str:
    """One line of JSON; text stays as it is, in UTF-8. Numbers are finite: anything else is a mistake of ours."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} occurs twice")
    return found


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")
