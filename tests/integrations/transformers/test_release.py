"""An older release, or none, is said in one line."""

import pytest

from epmoe.errors import UserError
from epmoe.integrations.transformers.release import OLDEST, check


def test_what_is_new_enough() -> None:
    assert [check(release) for release in (OLDEST, "5.23.0", "6.0.0.dev0")] == [OLDEST, "5.23.0", "6.0.0.dev0"]


@pytest.mark.parametrize(
    ("installed", "found"), [(None, "is not installed"), ("5.17.0", "is 5.17.0"), ("4.99", "4.99")]
)
def test_what_is_not(installed: str | None, found: str) -> None:
    with pytest.raises(UserError, match=rf"{found}, and 5.23 or later is needed: pip install"):
        check(installed)
