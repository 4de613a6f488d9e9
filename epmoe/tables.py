"""Tables of interchangeable parts: a name in the configuration → the class or function that it stands for.

FORMATS, PLACEMENTS, ROUTERS, EXPERTS, EXCHANGES and MODELS are plain dictionaries `{name: "module:attribute"}`. The
module is imported when its name is chosen, so that a CPU machine never imports Triton. Where a key allows it, the value
may be such a "package.module:Class" itself: a part that lives outside this repository.
"""

from collections.abc import Mapping
from importlib import import_module
from inspect import get_annotations
from typing import Any

from epmoe.errors import UserError


def lookup(key: str, table: Mapping[str, str], name: str, contract: type | None = None) -> Any:
    """The object that `name` stands for in `table`; `key` is the configuration key, for the messages.

    Args:
        contract: the Protocol that a class from outside must fulfil; None: the key takes names of the table only.
    Raises:
        UserError: the table has no such name (the message lists the known ones); a class from outside that cannot be
            imported, or lacks part of the contract.
    """
    if name in table:
        module, attribute = table[name].split(":")
        return getattr(import_module(module), attribute)
    if contract is not None and ":" in name:
        return _from_outside(key, name, contract)
    more = ", or package.module:Class" if contract is not None else ""
    raise UserError(f"{key}={name!r} is unknown; known: {', '.join(table)}{more}")


def _from_outside(key: str, name: str, contract: type) -> Any:
    """The class "package.module:Class" `name`, with all that the contract asks for."""
    module, _, attribute = name.partition(":")
    try:
        found = import_module(module)
    except (ImportError, ValueError, TypeError) as error:  # a module that is there may lack one of its own imports
        raise UserError(
            f"{key}={name!r}: {module} cannot be imported ({error}): give package.module:Class of a package that is "
            "installed, or that lies in the working directory or in PYTHONPATH"
        ) from error
    part: Any = found
    for each in attribute.split("."):  # a class may stand within another
        part = getattr(part, each, None)
    if not isinstance(part, type):
        has = "no class" if part is None else f"{type(part).__name__}, not a class,"
        raise UserError(f"{key}={name!r}: {module} has {has} {attribute}: give the name of a class in it")
    lacking = [member for member in _members(contract) if not _has(part, member, contract)]
    if lacking:
        raise UserError(
            f"{key}={name!r}: {attribute} lacks {', '.join(lacking)} of {contract.__module__}.{contract.__name__}, "
            f"the contract of such a class: add {'it' if len(lacking) == 1 else 'them'}"
        )
    return part


def _members(contract: type) -> list[str]:
    """What a Protocol asks for, in alphabetical order."""
    names = {name for each in contract.__mro__ for name in (*vars(each), *get_annotations(each))}
    return sorted(name for name in names if not name.startswith("_"))


def _has(part: type, member: str, contract: type) -> bool:
    """Whether the class has it: itself, or from another base than the contract, whose methods are empty.

    What the contract annotates is asked of the class, so it needs a value there; anything else may be a field.
    """
    of_class = member in get_annotations(contract)
    bases = (each for each in part.__mro__ if each is not contract)
    return any(member in vars(each) or (not of_class and member in get_annotations(each)) for each in bases)
