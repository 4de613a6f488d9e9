"""Recorded: which lines of an earlier run are taken over, and what is refused, with its place."""

import io
import json
from pathlib import Path

import pytest

from epmoe.engine.request import Request, SamplingParams
from epmoe.errors import UserError
from epmoe.text.recorded import Place, recorded, request_digest

DIGESTS = ["0" * 16, "1" * 16, "2" * 16]


def line(index: int, reason: str = "eos", **more: object) -> bytes:
    return json.dumps({"index": index, "request": f"{index}" * 16, "ids": [], "finish_reason": reason, **more}).encode()


def read(data: bytes, *, torn: bool = False) -> tuple[dict[int, Place], int]:
    return recorded(io.BytesIO(data), Path("o.jsonl"), DIGESTS, torn=torn)


def test_final_answers_and_where_they_lie() -> None:
    lines = [line(2) + b"\n", line(0, "error") + b"\n", line(1, "length") + b"\n", line(0, "abort") + b"\n"]
    found, end = read(b"".join(lines))
    assert found == {2: Place(0, len(lines[0])), 1: Place(len(lines[0] + lines[1]), len(lines[2]))}
    assert end == len(b"".join(lines))
    assert read(b"") == ({}, 0)
    assert set(read(line(0, "error") + b"\n" + line(0, "stop"))[0]) == {0}  # the last line may lack its end, if whole


def test_a_torn_line_is_dropped_where_a_run_may_have_been_killed() -> None:
    whole = line(0) + b"\n"
    for rest in (b"{", line(1)[:-1], line(1), b"\0\0"):
        assert read(whole + rest, torn=True) == ({0: Place(0, len(whole))}, len(whole))
    with pytest.raises(UserError, match=r"^o\.jsonl:2: not JSON"):
        read(whole + line(1)[:-1])
    with pytest.raises(UserError, match=r"^o\.jsonl:1: not JSON"):
        read(b"someone's notes", torn=True)  # no run has written that


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b"nonsense", "not JSON"),
        (b"", "not JSON"),
        (b"\xff", "not JSON"),
        (line(1, logprob=float("nan")), "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"7", "is no line that"),
        (b'{"index": 1}', "is no line that"),
        (line(1).replace(b'"index": 1', b'"index": "1"'), "is no line that"),
        (line(1).replace(b'"index": 1', b'"index": true'), "is no line that"),
        (line(1).replace(b'"index": 1', b'"index": -1'), "answers prompt 0"),
        (line(3), "answers prompt 4, and there are 3 prompts"),
        (line(1).replace(b'"1111', b'"2222'), "answers another prompt 2"),
    ],
)
def test_damage_is_told_with_its_place(bad: bytes, message: str) -> None:
    """Within the file torn=True forgives nothing."""
    data = line(0) + b"\n" + bad + b"\n" + line(2) + b"\n"
    for torn in (False, True):
        with pytest.raises(UserError, match=rf"^o\.jsonl:2:? ?.*{message}"):
            read(data, torn=torn)


def test_the_digest_is_of_all_that_an_answer_follows_from() -> None:
    request = Request((1, 2), SamplingParams())
    digests = [
        request_digest(request, {}),
        request_digest(Request((1, 3), SamplingParams()), {}),
        request_digest(Request((1, 2), SamplingParams(seed=1)), {}),
        request_digest(Request((1, 2), SamplingParams(max_new_tokens=7)), {}),
        request_digest(Request((1, 2), SamplingParams(stop=("a",))), {}),
        request_digest(request, {"hidden": 8}),
    ]
    assert len(set(digests)) == len(digests) and all(len(each) == 16 for each in digests)
    assert request_digest(Request((1, 2), SamplingParams()), {}) == digests[0]
