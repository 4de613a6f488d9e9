"""Options of the installed command → words that `compose.parse` takes.

--max-new-tokens 5   --max_new_tokens=5   max_new_tokens=5     the same key
--resume                                                       resume=true
"""

from collections import deque
from collections.abc import Sequence

from epmoe.config.keys import keys_of
from epmoe.errors import UserError

OWN = ("--help", "--cfg")  # options that are no keys


def words(argv: Sequence[str], schemas: Sequence[type]) -> list[str]:
    """The words with options as key=value; others stay. The schemas say which keys are true or false.

    Raises:
        UserError: a known key without a value.
    """
    keys = {name: each for schema in schemas for name, each in keys_of(schema).items()}
    found, rest = list[str](), deque(argv)
    while rest:
        word = rest.popleft()
        if not word.startswith("--") or word in OWN:
            found.append(word)
            continue
        option, equals, value = word.partition("=")
        name = option.removeprefix("--").replace("-", "_")
        if not equals and name in keys and keys[name].kind is bool and not _is_bool(rest):
            value = "true"
        elif not equals and rest and not rest[0].startswith("--"):
            value = rest.popleft()
        elif not equals and name in keys:
            raise UserError(f"{option} has no value: write {option}=VALUE")
        found.append(f"{name}={value}")
    return found


def _is_bool(rest: Sequence[str]) -> bool:
    return bool(rest) and rest[0].lower() in ("true", "false")
