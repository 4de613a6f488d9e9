"""Clients of all manners at random times: each request that its client stays for gets its answer, once.

stays    reads all of it, as it comes           slow     with a small buffer, and pauses
twice    two requests behind each other         leaves   closes, or resets, when some of the answer has come, or none
head     is gone before the head is complete    body     before the body is
bad      a body that is refused
"""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from asking import COMPLETIONS, Asked, Told, told
from wire import Answer, answers, connection, reset

from scripts.fuzzing.requests import message

LIMIT_S = 120.0  # of one client
SMALL = 4096  # a slow client's buffer
CLOSE = ("Connection", "close")
BAD = ('{"prompt": "a", "max_tokens": -1}', '{"prompt": ', '{"prompt": "a", "frobnicate": 1}', "[]", '{"prompt": [-1]}')
Kinds = Sequence[tuple[Asked, list[Told]]]  # requests, each with the answers that it has alone
Line = tuple[str, int]  # of the log: path and status


@dataclass
class Storm:
    """One of them; after it, what must stand in the server's log.

    Args:
        once: each of the kinds is asked for once; else any, at random.
        lines: of those whose status is known; `left` of clients that went away, by path.
        tokens: of those that came to their end: path and number of tokens.
    """

    port: int
    kinds: Kinds
    once: bool = False
    lines: Counter[Line] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)
    tokens: Counter[tuple[str, int]] = field(default_factory=Counter)

    async def run(self, seeds: Sequence[int], ways: Sequence[str], together: int, pause_s: float) -> None:
        """A client for each seed, so many at a time.

        Args:
            pause_s: a client waits up to so long before it comes.
        Raises:
            AssertionError: an answer that is not the one that it is alone. TimeoutError: none came.
        """
        gate = asyncio.Semaphore(together)

        async def one(seed: int) -> None:
            rng = random.Random(f"client {seed}")
            async with gate, asyncio.timeout(LIMIT_S):
                await asyncio.sleep(rng.uniform(0, pause_s))
                await WAYS[rng.choice(ways)](self, rng)

        async with asyncio.TaskGroup() as group:
            for seed in seeds:
                group.create_task(one(seed))

    def check_log(self, text: str) -> None:
        """Raises AssertionError where a request has no line, or two, or another one than it must have."""
        records = [json.loads(line) for line in text.splitlines()]
        logged = Counter((each["path"], each["status"]) for each in records)
        assert {status for _, status in logged} <= {200, 400, 499}, logged
        for path in {path for path, _ in (*logged, *self.lines)}:
            count = {status: logged[path, status] for status in (200, 400, 499)}
            assert sum(count.values()) == self.left[path] + sum(self.lines[path, status] for status in count), path
            assert count[400] == self.lines[path, 400], (path, logged, self.lines)
            assert all(count[status] >= self.lines[path, status] for status in (200, 499)), (path, logged, self.lines)
        found = Counter((each["path"], each["completion_tokens"]) for each in records if each["status"] == 200)
        assert self.tokens <= found, self.tokens - found

    def __post_init__(self) -> None:
        self.rest = iter(self.kinds)

    def pick(self, rng: random.Random) -> tuple[Asked, list[Told]]:
        """The next request to ask, and its answers."""
        return next(self.rest) if self.once else rng.choice(self.kinds)

    def judge(self, one: Asked, expected: list[Told], answer: Answer) -> None:
        found = told(one, answer)
        assert found == expected, (one, found, expected)
        self.lines[one.path, 200] += 1
        self.tokens[one.path, sum(count for _, count, *_ in found)] += 1


async def stays(storm: Storm, rng: random.Random) -> None:
    await _read(storm, rng, buffer=1 << 16, pause_s=0.0)


async def slow(storm: Storm, rng: random.Random) -> None:
    await _read(storm, rng, buffer=SMALL, pause_s=0.003)


async def _read(storm: Storm, rng: random.Random, buffer: int, pause_s: float) -> None:
    one, expected = storm.pick(rng)
    async with connection(storm.port, buffer) as (reader, writer):
        writer.write(_message(one, CLOSE))
        await asyncio.sleep(50 * pause_s)
        data = b""
        while piece := await reader.read(buffer):
            data += piece
            await asyncio.sleep(pause_s)
    (answer,) = answers(data, ended=True)
    storm.judge(one, expected, answer)


async def twice(storm: Storm, rng: random.Random) -> None:
    """Both sent before the first one's answer, or the second one behind it, over the same connection."""
    first, second = storm.pick(rng), storm.pick(rng)
    async with connection(storm.port) as (reader, writer):
        if rng.random() < 0.5:
            writer.write(_message(first[0]) + _message(second[0], CLOSE))
            data = await reader.read(-1)
        else:
            writer.write(_message(first[0]))
            data = b""
            while not any(each.whole for each in answers(data, ended=False)):
                piece = await reader.read(1 << 16)
                assert piece, data
                data += piece
            writer.write(_message(second[0], CLOSE))
            data += await reader.read(-1)
    found = answers(data, ended=True)
    assert len(found) == 2, found
    for (one, expected), answer in zip((first, second), found, strict=True):
        storm.judge(one, expected, answer)


async def leaves(storm: Storm, rng: random.Random) -> None:
    one, _ = storm.pick(rng)
    storm.left[one.path] += 1
    async with connection(storm.port) as (reader, writer):
        writer.write(_message(one))
        if rng.random() < 0.4:  # a close alone: a reset might come before the server has read anything
            await asyncio.sleep(rng.uniform(0, 0.1))
            return
        with suppress(ConnectionError):
            await reader.read(rng.choice((1, 300, 2000)))
        if rng.random() < 0.5:
            reset(writer)


async def head(storm: Storm, rng: random.Random) -> None:
    data = _message(storm.pick(rng)[0]).partition(b"\r\n\r\n")[0]
    await _part(storm, rng, data[: rng.randrange(len(data))])


async def body(storm: Storm, rng: random.Random) -> None:
    one, _ = storm.pick(rng)
    storm.lines[one.path, 499] += 1
    data = _message(one)
    await _part(storm, rng, data[: rng.randrange(data.index(b"\r\n\r\n") + 4, len(data))])


async def _part(storm: Storm, rng: random.Random, data: bytes) -> None:
    async with connection(storm.port) as (_, writer):
        writer.write(data)
        await asyncio.sleep(rng.uniform(0, 0.05))


async def bad(storm: Storm, rng: random.Random) -> None:
    storm.lines[COMPLETIONS, 400] += 1
    async with connection(storm.port) as (reader, writer):
        writer.write(message(COMPLETIONS, rng.choice(BAD).encode(), CLOSE))
        (answer,) = answers(await reader.read(-1), ended=True)
    assert answer.status == 400 and answer.value["error"]["message"], answer


def _message(one: Asked, *headers: tuple[str, str]) -> bytes:
    return message(one.path, json.dumps(one.body).encode(), *headers)


WAYS: dict[str, Callable[[Storm, random.Random], Coroutine[None, None, None]]] = {
    each.__name__: each for each in (stays, slow, twice, leaves, head, body, bad)
}
