"""JSON by its standard: what Python's own reader and writer let through is refused."""

import json

import pytest

from epmoe.strictjson import dumps, loads


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 1}}', "the key 'c' occurs twice"),
        ('{"a": 1, "\\u0061": 2}', "the key 'a' occurs twice"),
        ("[NaN]", "NaN is no number of JSON"),
        ("-Infinity", "-Infinity is no number of JSON"),
        ("[" * 10**6, "nested too deeply"),
        ('{"a":' * 10**5 + "1" + "}" * 10**5, "nested too deeply"),
        (b"\xff\xfe\xfa", "decode"),
        ("{", "Expecting"),
        ("", "Expecting"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_refused(text: str | bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        loads(text)


def test_read_and_written() -> None:
    value = {"text": "é\u2028", "n": [1, -0.5, 1e300, None, True], "": {}}
    assert loads(dumps(value)) == loads(json.dumps(value).encode("utf-16")) == value
    assert "\n" not in dumps({"text": "a\nb"})


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_no_other_number_is_written(number: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        dumps({"logprob": number})
