"""A prompt enters while others decode: when its first token comes, and how long the others wait for their next one.

`mixed=64x448`: 64 sequences decode, a prompt of 448 tokens enters; when its token has come, some steps pass without a
prompt, and the next one enters.

    first     from the prompt's admission to its first token, over however many steps the engine takes for it
    between   the longest time between two tokens that any of the others sees meanwhile, and in the step behind it
    bare      the same time in steps without a prompt: the median
"""

import statistics
import time

from epmoe.bench.conditions import Record
from epmoe.bench.decode import Batch
from epmoe.engine.engine import Engine
from epmoe.engine.request import Finished, Request, Token, Workload
from epmoe.errors import UserError
from epmoe.llm import LLM
from epmoe.streams import tell

SETTLE = 8  # steps without a prompt before each one
# A step takes so many tokens of a prompt at least. It only bounds how long the others decode.
PIECE = 256


def decoded_tokens(tokens: int, samples: int) -> int:
    """New tokens of each sequence that decodes: more than the run has steps."""
    return (samples + 1) * (-(-tokens // PIECE) + 3 + SETTLE)


class Watched:
    """An engine's steps, and when each request's last token came."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.come_s: dict[int, float] = {}  # by request
        self.ended: set[int] = set()

    def step(self) -> list[float]:
        """One step; for each request that got another token, the seconds since its last one. A collective."""
        events = self.engine.step()
        now = time.perf_counter()
        found = [event.id for event in events if isinstance(event, Token)]
        gaps = [now - self.come_s[id] for id in found if id in self.come_s]
        self.come_s |= dict.fromkeys(found, now)
        for event in events:
            if isinstance(event, Finished):
                if event.result.finish_reason == "error":
                    raise UserError("the model's logits are not finite, so nothing can be measured: take another model")
                self.ended.add(event.id)
        return gaps

    def enter(self, request: Request) -> tuple[float, int, float]:
        """Seconds to the request's one token, the steps it took, and the longest time between others' tokens.

        A collective.
        """
        gaps: list[float] = []
        begin, steps = time.perf_counter(), 0
        id = self.engine.add(request)
        while id not in self.ended:
            gaps += self.step()
            steps += 1
        first_s = self.come_s[id] - begin
        return first_s, steps, max(gaps + self.step())


def measure_mixed(llm: LLM, mixed: tuple[int, int], prompt_tokens: int, samples: int) -> Record:
    """For `mixed`, sequences that decode and tokens of the prompt that enters, without its floor; a collective.

    Those that decode begin with `prompt_tokens`.
    """
    (sequences, tokens), engine, vocab = mixed, llm.engine, llm.architecture.vocab
    decoding = Batch.of(sequences, prompt_tokens, vocab).requests(decoded_tokens(tokens, samples))
    entering = Batch.of(1 + samples, tokens, vocab, seed=1).requests(1)
    engine.prepare(Workload.of([*decoding, entering[0]], engine.max_batch))
    watched = Watched(engine)
    ids = [engine.add(request) for request in decoding]
    while not watched.come_s.keys() >= set(ids):
        watched.step()
    found: list[tuple[float, int, float]] = []
    bare: list[float] = []
    for request in entering:
        for _ in range(SETTLE):
            bare += watched.step()
        found.append(watched.enter(request))
    del found[0]  # a warm-up
    assert not watched.ended & set(ids), "the others ended before the last prompt came"
    for id in ids:
        engine.abort(id)
    first_s, steps, between_s = zip(*found, strict=True)
    row = {
        "sequences": sequences,
        "tokens": tokens,
        "first_ms": 1e3 * statistics.median(first_s),
        "best_first_ms": 1e3 * min(first_s),
        "steps": max(steps),
        "between_ms": 1e3 * statistics.median(between_s),
        "bare_ms": 1e3 * statistics.median(bare),
    }
    if llm.ranks.is_main:
        tell(f"epmoe: {sequences} with a prompt of {tokens}: {row['first_ms']:.3f} ms to its first token")
    return row
