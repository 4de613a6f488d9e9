"""Tables of interchangeable parts: a name in the configuration → the class or function that it stands for.

FORMATS, PLACEMENTS, ROUTERS, EXPERTS, EXCHANGES and MODELS are plain dictionaries `{name: "module:attribute"}`. The
module is imported when its name is chosen, so that a CPU machine never imports Triton.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from epmoe.errors import UserError


def lookup(key: str, table: Mapping[str, str], name: str) -> Any:
    """The object that `name` stands for in `table`; `key` is the configuration key, for the message.

    Raises:
        UserError: the table has no such name; the message lists the known ones.
    """
    if name not in table:
        raise UserError(f"{key}={name!r} is unknown; known: {', '.join(table)}")
    module, attribute = table[name].split(":")
    return getattr(import_module(module), attribute)
