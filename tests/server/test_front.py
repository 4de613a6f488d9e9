"""Long prompts' log-probabilities: others' streams go on while they come, are spelled, written and sent."""

import http.client
import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import psutil
import pytest
from scripted import save_tokenizer

from epmoe.engine.call import Call
from epmoe.engine.figures import Figures
from epmoe.engine.request import Finished, Result, SamplingParams, Token, TokenLogprobs
from epmoe.server.door import Door, listen
from epmoe.server.frames import Hello, Ready

TOKENS, TOP = 60_000, 10
SCORES = (
    None,
    *(
        TokenLogprobs(-1 - n / 7, tuple(((n + k) % 200, -2.0 - k - n / 9) for k in range(TOP)))
        for n in range(TOKENS - 1)
    ),
)
OWN = TokenLogprobs(-1.0, ((5, -1.0),))


class Fake:
    """A service whose engine has all scores at once, and a token each 10 ms for others."""

    def submit(self, calls: Sequence[Call]) -> None:
        for call in calls:
            threading.Thread(target=self.answer, args=(call,), daemon=True).start()

    def answer(self, call: Call) -> None:
        if call.request.params.prompt_logprobs is not None:
            call.hear(Token(0, 65, OWN, SCORES))
            call.hear(Finished(0, Result((65, 66), "length", 0.0, 0.0, (OWN, OWN), 0, SCORES)))
            return
        while not call.ended:
            time.sleep(0.01)
            call.hear(Token(0, 65, None))

    def abort(self, call: Call) -> None:
        call.ended = True


class Alone(Door):
    """Without an engine there are no figures."""

    def _figures(self) -> Sequence[Figures]:
        return ()


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    file = tmp_path_factory.mktemp("front") / "tokenizer.json"
    save_tokenizer(file)
    hello = Hello(
        model="m", release="0", created=0, vocab=352, max_positions=10**6, tokenizer_file=str(file), templates={},
        special={}, chat="off", system=None, variables={}, defaults=asdict(SamplingParams()), most_requests=16,
        queue_requests=8, max_body=10**6, max_bodies=10**7, header_s=60.0, stalled_s=60.0, api_key="", log="",
        responses=0,
    )  # fmt: skip
    service: Any = Fake()
    with listen("127.0.0.1", 0) as listener:
        door = Alone(hello, listener)
        door.open(service, Ready("f", 10**6))
        yield door
        door.close()


def asked(door: Door, body: dict[str, Any]) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    connection = http.client.HTTPConnection("127.0.0.1", door.listener.getsockname()[1], timeout=120)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    return connection, connection.getresponse()


@pytest.mark.alone
@pytest.mark.parametrize("stream", [pytest.param(False, marks=pytest.mark.slow), True], ids=["at once", "stream"])
def test_nobody_waits_for_the_scores_of_a_long_prompt(stream: bool, door: Door) -> None:
    """Spelled, and written, at once they would take several seconds, in which nothing else came.

    Those of the clock and of the HTTP process' own: a machine that stands still makes only the first ones more.
    """
    times, over, process = list[tuple[float, float]](), threading.Event(), psutil.Process(door.http.process.pid)

    def follow() -> None:
        connection, answer = asked(door, {"prompt": "a", "max_tokens": 100_000, "stream": True})
        with closing(connection):
            while not over.is_set() and answer.readline():
                used = process.cpu_times()
                times.append((time.monotonic(), used.user + used.system))

    other = threading.Thread(target=follow)
    other.start()
    while len(times) < 20:
        assert other.is_alive()
        time.sleep(0.01)
    ids = [number % 200 for number in range(TOKENS)]
    connection, answer = asked(door, {"prompt": ids, "max_tokens": 2, "echo": True, "logprobs": TOP, "stream": stream})
    with closing(connection):
        data = answer.read()
    count = len(times)
    over.set()
    other.join(60)
    gaps = [(after[0] - before[0], after[1] - before[1]) for before, after in pairwise(times[:count])]
    assert count > 50 and max(map(min, gaps)) < 1.0
    if stream:
        first, *_, last = data.split(b"\n\n")[:-1]
        assert last == b"data: [DONE]"
        data = first.removeprefix(b"data: ")
    else:
        assert int(answer.headers["content-length"]) == len(data)
    found = json.loads(data)["choices"][0]["logprobs"]
    assert found["token_logprobs"][:TOKENS] == [None if each is None else each.chosen for each in SCORES]
    values = [None if each is None else sorted(each.values()) for each in found["top_logprobs"][:TOKENS]]
    assert values == [None if each is None else sorted(value for _, value in each.top) for each in SCORES]
