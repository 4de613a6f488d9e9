"""What rank 0 and its HTTP process say to each other: frames of 4 bytes of length, little endian, and msgpack.

HTTP → rank 0      Up · Opened · Broken · Submit · Abort · Idle
rank 0 → HTTP      Hello · Ready · Step · Scores · Refused · Load · Drain · Bye

Rank 0 in its turn asks the other replicas of the model, by their first ranks:

rank 0 → replica   Submit · Abort · Halt · Bye
replica → rank 0   Up · Step · Scores · Refused · Load · Bye
"""

import struct
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, overload

import msgspec

from epmoe.engine.figures import Figures
from epmoe.engine.request import PromptLogprobs, TokenLogprobs

_LENGTH = struct.Struct("<I")
MOST = 256 << 20  # bytes of a frame
SCORES = 4096  # log-probabilities in a frame: some milliseconds to write
PIECE = 1 << 20  # most bytes that either end reads at once


class Damaged(Exception):
    """What came is no frame: the other end is not what it should be."""


class Frame(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Any of the following."""


class Hello(Frame, frozen=True):
    """What the HTTP process needs to know, once."""

    model: str  # its name for clients
    release: str
    created: int  # when the server began, seconds since 1970
    vocab: int
    max_positions: int
    tokenizer_file: str
    templates: dict[str, str]  # chat templates by name
    special: dict[str, str]  # tokens that templates may use
    chat: str
    system: str | None
    variables: dict[str, Any]  # of the chat template, for all prompts
    defaults: dict[str, Any]  # SamplingParams, for what a request leaves out
    most_requests: int  # that may be in flight
    queue_requests: int
    max_body: int
    max_bodies: int
    header_s: float
    stalled_s: float
    api_key: str
    log: str
    responses: int  # that are kept


class Ready(Frame, frozen=True):
    """Requests may come."""

    fingerprint: str  # of the weights and the release
    room: int  # most positions of one request in the cache


class NewToken(msgspec.Struct, array_like=True, frozen=True):
    """A token of a call that goes on."""

    call: int
    token: int
    logprobs: TokenLogprobs | None
    cached_tokens: int = 0


class Ended(msgspec.Struct, array_like=True, frozen=True):
    """The end of a call, with what no token has brought."""

    call: int
    reason: str
    ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    cached_tokens: int
    failure: str = ""


class Failed(msgspec.Struct, array_like=True, frozen=True):
    """There is no answer to a call."""

    call: int
    text: str


class Step(Frame, frozen=True):
    """What has come since the last one, in its order; after a step of the engine all of its tokens."""

    tokens: list[NewToken]
    ends: list[Ended]
    failed: list[Failed]


class Scores(Frame, frozen=True):
    """Log-probabilities of so many of a prompt's next tokens; all come before its call's first token, or its end.

    There may be 100,000 and more, so they are read when they are needed, a frame after the other.
    """

    call: int
    count: int
    logprobs: Any  # a PromptLogprobs, on its way msgpack


class _Received(Scores, frozen=True, tag="Scores"):
    """The same, not read."""

    logprobs: msgspec.Raw


class Packed(Sequence[TokenLogprobs | None]):
    """The log-probabilities of some frames, which are read anew each time that one goes through them."""

    def __init__(self, frames: Sequence[Scores]) -> None:
        self.frames = frames

    def __len__(self) -> int:
        return sum(each.count for each in self.frames)

    def __iter__(self) -> Iterator[TokenLogprobs | None]:
        for each in self.frames:
            yield from _scores.decode(each.logprobs)

    @overload
    def __getitem__(self, at: int) -> TokenLogprobs | None: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[TokenLogprobs | None]: ...
    def __getitem__(self, at: int | slice) -> TokenLogprobs | Sequence[TokenLogprobs | None] | None:
        return tuple(self)[at]


def scores(call: int, found: PromptLogprobs) -> Iterator[Scores]:
    """The frames that tell of these; what has come in frames goes on in them, and is not read."""
    if isinstance(found, Packed):
        yield from (Scores(call, each.count, each.logprobs) for each in found.frames)
        return
    width = max((1 + len(each.top) for each in islice(found, 2) if each is not None), default=1)
    size = max(1, SCORES // width)
    for begin in range(0, len(found), size):
        yield Scores(call, len(part := found[begin : begin + size]), part)


class Refused(Frame, frozen=True):
    """These calls do not wait for their turn: one of KINDS."""

    calls: list[int]
    kind: str
    text: str


KINDS = ("mistake", "full", "stopped")  # of a refusal: UserError, QueueFull, Stopped


class Load(Frame, frozen=True):
    """Figures, once a second at most: of each replica that serves, at least one."""

    replicas: list[Figures]


class Drain(Frame, frozen=True):
    """No new requests; those in flight go on."""


class Bye(Frame, frozen=True):
    """No more frames come: finish what is being sent, and end."""


class Halt(Frame, frozen=True):
    """The service is to end; with a text calls fail that have not ended."""

    text: str


class Up(Frame, frozen=True):
    """The HTTP process answers; or the replica does."""


class Opened(Frame, frozen=True):
    """It lets requests in."""


class Broken(Frame, frozen=True):
    """A user's mistake, found in the HTTP process: the run ends with it."""

    text: str


class Ask(msgspec.Struct, array_like=True, frozen=True):
    """A prompt, with the number and the SamplingParams of each answer to it."""

    ids: list[int]
    priority: int
    calls: list[tuple[int, dict[str, Any]]]


class Submit(Frame, frozen=True):
    """Let these wait for their turn, all or none."""

    asks: list[Ask]


class Abort(Frame, frozen=True):
    """Nobody waits for these any more."""

    calls: list[int]


class Idle(Frame, frozen=True):
    """After Drain: nothing is in flight any more."""


FromHttp = Up | Opened | Broken | Submit | Abort | Idle
FromReplica = Up | Step | _Received | Refused | Load | Bye
ToReplica = Submit | Abort | Halt | Bye
FromRank0 = Hello | Ready | Step | _Received | Refused | Load | Drain | Bye
_encoder = msgspec.msgpack.Encoder()
_scores = msgspec.msgpack.Decoder(tuple[TokenLogprobs | None, ...])


def packed(frame: Frame) -> bytes:
    """The frame's bytes; raises Damaged for one that is too long."""
    data = _encoder.encode(frame)
    if len(data) > MOST:
        raise Damaged(f"a frame of {len(data)} bytes, and at most {MOST} go through")
    return _LENGTH.pack(len(data)) + data


class Frames:
    """Bytes in any pieces → frames of one of the two unions above."""

    def __init__(self, union: Any, most: int = MOST) -> None:
        self.decoder = msgspec.msgpack.Decoder(union)
        self.most = most
        self.data = bytearray()

    def feed(self, piece: bytes) -> Iterator[Any]:
        """The frames that are complete now.

        Raises:
            Damaged: too long a frame, or one that is none.
        """
        self.data += piece
        while len(self.data) >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(self.data)
            if size > self.most:
                raise Damaged(f"a frame of {size} bytes, and at most {self.most} may come")
            end = _LENGTH.size + size
            if len(self.data) < end:
                return
            body = bytes(memoryview(self.data)[_LENGTH.size : end])
            del self.data[:end]
            try:
                yield self.decoder.decode(body)
            except (msgspec.MsgspecError, RecursionError, ValueError) as error:
                raise Damaged(f"a frame that is none ({error})") from error
