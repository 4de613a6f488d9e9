"""What came of a case: an error line, text that is right, or a fault of ours.

A run that ends in an error says one line that begins with "epmoe: error: ", of at most 500 characters, exits non-zero,
and has written no text. A run that ends well has the clean run's text, or the damage may change it.
"""

import re

from scripts.fuzzing.cases import Outcome

MOST_CHARACTERS = 500
# Notes that may stand beside an error; everything on standard error begins so.
NOTE = re.compile(r"epmoe: ")


def fault(outcome: Outcome, clean: str) -> str:
    """What is wrong with it; "" when nothing is. `clean` is the text of the undamaged checkpoint."""
    lines = outcome.stderr.splitlines()
    errors = [line for line in lines if line.startswith("epmoe: error: ")]
    found = {
        outcome.stopped: bool(outcome.stopped),
        f"died of signal {-outcome.code}": outcome.code < 0,
        "a traceback": "Traceback (most recent call last)" in outcome.stderr,
        "a panic": "panicked at" in outcome.stderr,
        "a long line": any(len(line) > MOST_CHARACTERS for line in lines),
        "a strange line": any(not NOTE.match(line) for line in lines),
        "an error without a line": outcome.code != 0 and not errors,
        "several error lines": len(errors) > 1,
        "an error and exit 0": outcome.code == 0 and bool(errors),
        "text beside an error": outcome.code != 0 and bool(outcome.stdout.strip()),
        "other text": outcome.code == 0 and outcome.stdout != clean and not outcome.damage.may_change,
    }
    return next((words for words, is_so in found.items() if is_so), "")


def verdict(outcome: Outcome, clean: str) -> str:
    """One of "fault", "refused", "the same text", "other text"."""
    if fault(outcome, clean):
        return "fault"
    if outcome.code:
        return "refused"
    return "the same text" if outcome.stdout == clean else "other text"
