"""Whether the installed release of transformers has the interfaces that this folder's other files take."""

from importlib.metadata import PackageNotFoundError, version

from epmoe.errors import UserError

OLDEST = "5.23"  # the one that this was written and tested with


def check(installed: str | None) -> str:
    """The release itself.

    Raises:
        UserError: none is installed, or an older one.
    """
    if installed is None or _numbers(installed) < _numbers(OLDEST):
        found = "is not installed" if installed is None else f"is {installed}"
        raise UserError(
            f"epmoe.integrations.transformers: transformers {found}, and {OLDEST} or later is needed: "
            "pip install 'epmoe[transformers]'"
        )
    return installed


def _numbers(release: str) -> tuple[int, int]:
    """
    >>> _numbers("5.17.0"), _numbers("6.0.0rc1")
    ((5, 17), (6, 0))
    """
    major, minor, *_ = release.split(".")
    return int(major), int(minor)


def _installed() -> str | None:
    try:
        return version("transformers")
    except PackageNotFoundError:
        return None


RELEASE = check(_installed())
