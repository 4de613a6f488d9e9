"""Frames: there and back in any pieces; what is none, or too long, is told at once."""

import random

import msgspec
import pytest

from epmoe.engine.figures import Figures
from epmoe.engine.request import TokenLogprobs
from epmoe.server.frames import (
    SCORES,
    Abort,
    Ask,
    Damaged,
    Ended,
    Failed,
    Frame,
    Frames,
    FromHttp,
    FromRank0,
    FromReplica,
    Load,
    NewToken,
    Opened,
    Packed,
    Refused,
    Step,
    Submit,
    Up,
    packed,
    scores,
)  # fmt: skip

LOGPROBS = TokenLogprobs(-0.5, ((3, -0.5), (7, -1.25)))
FROM_0: list[Frame] = [
    Step([NewToken(1, 5, LOGPROBS, 4), NewToken(2, 6, None)], [], []),
    Step([], [Ended(1, "eos", (9,), (LOGPROBS,), 16)], [Failed(2, "it failed")]),
    Refused([1, 2], "full", "come again"),
    Load([Figures(1, 2, 3, 4, 5, 6, 7, 8, 0.5), Figures(1, 2, 3, 4, 5, 6, 7, 8, 0.5, 9, 9, 1)]),
]
FROM_HTTP: list[Frame] = [
    Up(),
    Opened(),
    Submit([Ask([1, 2, 3], -1, [(7, {"seed": 2**53 - 1, "stop": ["a"]})])]),
    Abort([7]),
]


@pytest.mark.parametrize(("union", "frames"), [(FromRank0, FROM_0), (FromHttp, FROM_HTTP)], ids=["rank 0", "HTTP"])
def test_there_and_back_in_any_pieces(union: object, frames: list[Frame]) -> None:
    data = b"".join(map(packed, frames))
    rng = random.Random(0)
    for most in (1, 3, 50, len(data)):
        reader, found, place = Frames(union), list[object](), 0
        while place < len(data):
            size = rng.randint(1, most)
            found += reader.feed(data[place : place + size])
            place += size
        assert found == frames and not reader.data


@pytest.mark.parametrize("count", [1, 2, SCORES // 3, SCORES // 3 + 1, 4000])
def test_scores_of_a_prompt_come_in_several_frames(count: int) -> None:
    """None of which takes long; they are read when they are gone through, each time alike."""
    given = (None, *(TokenLogprobs(-number / 7, ((number, -0.5), (7, -1.25))) for number in range(count - 1)))
    frames = list(scores(3, given))
    assert len(frames) == -(-count * 3 // (SCORES // 3 * 3)) if count > 1 else 1
    found = [each for frame in frames for each in Frames(FromRank0).feed(packed(frame))]
    whole = Packed(found)
    assert all(each.call == 3 and isinstance(each.logprobs, msgspec.Raw) for each in found)
    assert len(whole) == count and tuple(whole) == given == tuple(whole) and bool(whole)
    assert whole[-1] == given[-1] and whole[1:3] == given[1:3]
    assert list(scores(3, ())) == [] and not Packed([])


def test_scores_that_came_in_frames_go_on_in_them() -> None:
    """From another replica to rank 0 to the HTTP process: reading them for each frame took minutes."""
    given = (None, *(TokenLogprobs(-number / 7, ((number, -0.5),)) for number in range(2 * SCORES)))
    came = [each for frame in scores(3, given) for each in Frames(FromReplica).feed(packed(frame))]
    on = list(scores(8, Packed(came)))
    assert all(one.logprobs is other.logprobs for one, other in zip(on, came, strict=True)) and len(on) > 2
    found = [each for frame in on for each in Frames(FromRank0).feed(packed(frame))]
    assert {each.call for each in found} == {8} and tuple(Packed(found)) == given


def test_damage_is_an_error_and_nothing_else() -> None:
    """One byte of many frames is another, and most of the time that is seen; nothing else than Damaged is raised."""
    rng = random.Random(1)
    seen = 0
    for _ in range(2000):
        data = bytearray(packed(rng.choice(FROM_HTTP)) + packed(rng.choice(FROM_HTTP)))
        data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            list(Frames(FromHttp, most=1 << 20).feed(bytes(data)))
        except Damaged:
            seen += 1
    assert seen > 500


def test_bounds() -> None:
    with pytest.raises(Damaged, match="at most 100 may come"):
        list(Frames(FromHttp, most=100).feed((101).to_bytes(4, "little")))
    with pytest.raises(Damaged):  # what only rank 0 says
        list(Frames(FromHttp).feed(packed(FROM_0[0])))
