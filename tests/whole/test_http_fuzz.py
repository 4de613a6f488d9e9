"""Damaged requests over real connections: each is answered or refused with a 4xx, and the server goes on as before."""

import asyncio
import random
import re
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import pytest
from served import Server, served
from wire import Answer, answers, exchange

from scripts.fuzzing.requests import KINDS, Sent, made

HEADER_S = 2.0  # what is not complete by then is closed
LIMIT_S = 200.0  # of one connection: up to five answers of all the tokens that the cache has room for
TOGETHER = 40  # connections
SMALL = ("runtime.cache_tokens=128", "runtime.page=4", "serve.max_body=200000", f"serve.header_s={HEADER_S}")
GRAMMAR = re.compile(r"epmoe: warning: request \d+ cannot go on: its grammar has failed \(.*\)")  # the one line
ERROR = {"message", "type", "param", "code"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with served(tmp_path_factory.mktemp("server"), *SMALL, forked=True) as one:
        yield one


def fault(sent: Sent, said: bytes) -> str:
    """What is wrong with the answers to it; "" when nothing is."""
    try:
        found = answers(said, ended=True)
    except ValueError as error:
        return str(error)
    if wrong := [each for each in found if not (each.status == 200 or 400 <= each.status < 500)]:
        return f"{wrong[0].status} {wrong[0].body[:300]!r}"
    if sent.answered and len(found) != 1:
        return f"{len(found)} answers"
    if sent.answered and not (found[0].whole and (found[0].status == 200 or _is_openais(found[0]))):
        return f"{found[0].status} {found[0].body[:300]!r}"
    return ""


def _cut(said: bytes) -> bool:
    """No answer came whole: so it looks where the server had closed the connection."""
    try:
        return not any(each.whole for each in answers(said, ended=True))
    except ValueError:
        return False


def _is_openais(answer: Answer) -> bool:
    error = answer.value.get("error")
    return isinstance(error, dict) and set(error) == ERROR and isinstance(error["message"], str)


async def one(port: int, kind: str, seed: int, gate: asyncio.Semaphore) -> tuple[str, list[int]]:
    """A fault in words, or "", and the statuses that came."""
    async with gate:
        sent, rng = made(kind, seed), random.Random(seed)
        cuts = sorted(rng.randrange(len(sent.data) + 1) for _ in range(rng.choice((0, 0, 1, 3))))
        pieces = [sent.data[begin:end] for begin, end in pairwise((0, *cuts, len(sent.data)))]
        for _ in range(4):
            try:
                said, sending_s = await exchange(port, pieces, LIMIT_S)
            except TimeoutError:
                return f"{kind} {seed}: not closed within {LIMIT_S:g} s: {sent.words[:200]}", []
            wrong = fault(sent, said)
            late = sending_s > HEADER_S / 2 and _cut(said)
            if not (wrong and late):  # else this process was late with it
                break
    if wrong:
        return f"{kind} {seed}: {wrong}: {sent.words[:200]}", []
    return "", [each.status for each in answers(said, ended=True)]


async def storm(port: int, seeds: range) -> tuple[list[str], dict[str, Counter[int]]]:
    """All kinds with these seeds, several at a time: faults, and how often each status came of each kind."""
    gate, cases = asyncio.Semaphore(TOGETHER), [(kind, seed) for seed in seeds for kind in KINDS]
    found = await asyncio.gather(*(one(port, *case, gate) for case in cases))
    counts: dict[str, Counter[int]] = {kind: Counter() for kind in KINDS}
    for (kind, _), (_, statuses) in zip(cases, found, strict=True):
        counts[kind].update(statuses)
    return [wrong for wrong, _ in found if wrong], counts


def check(server: Server, seeds: range) -> None:
    said, process = server.stderr, server.ask("/version")[1]["pid"]
    before = server.ask("/v1/completions", {"prompt": "It was", "max_tokens": 8})[1]["choices"]
    wrong, counts = asyncio.run(storm(server.port, seeds))
    assert not wrong, "\n".join(wrong)
    for kind, count in counts.items():  # the damage is real, and some of it leaves a request valid
        assert count.total() - count[200] > len(seeds) / 8 and (count[200] or kind in ("body", "raw")), (kind, count)
    assert server.ask("/v1/completions", {"prompt": "It was", "max_tokens": 8})[1]["choices"] == before
    server.comes_to_rest()
    assert server.ask("/version")[1]["pid"] == process
    new = server.stderr.removeprefix(said).splitlines()
    assert [line for line in new if not GRAMMAR.fullmatch(line)] == []


def test_damaged_requests(server: Server) -> None:
    check(server, range(16, 40))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_many_damaged_requests(server: Server) -> None:
    check(server, range(1000, 1800))


RIGHT = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"
FAULTS = {
    "500": RIGHT.replace(b"200", b"500"),
    "307": RIGHT.replace(b"200", b"307"),
    "0 answers": b"",
    "2 answers": 2 * RIGHT,
    "200 b'{'": RIGHT[:-1],
    "400 b'{}'": RIGHT.replace(b"200", b"400"),
    "no answer": b"{}",
}


@pytest.mark.parametrize("words", FAULTS)
def test_the_judge_sees(words: str) -> None:
    assert fault(Sent("", b"", answered=True), FAULTS[words]).startswith(words)


def test_the_judge_lets_pass() -> None:
    error = b'{"error":{"message":"","type":"","param":null,"code":null}}'
    refused = b"HTTP/1.1 400 Bad\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(error), error)
    for said in (RIGHT, refused):
        assert fault(Sent("", b"", answered=True), said) == ""
    assert fault(Sent("", b""), b"") == fault(Sent("", b""), RIGHT + refused) == ""


def test_a_seed_says_it_all() -> None:
    for kind in KINDS:
        assert made(kind, 7) == made(kind, 7) != made(kind, 8)
