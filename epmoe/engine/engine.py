"""Engine: requests → token ids, several sequences in one forward pass, each entering and leaving when it can.

    waiting ──admit──▶ running ──▶ prefill: chunks of prompts; those that end choose their first token
                          │           │
                          └──────▶ decode: one token of each sequence whose prompt is cached (epmoe/engine/graphs.py)
                                      │
                     flights ◀────────┘ ids on their way to the host, read one launch later

The next decode step is launched before the last one's ids are read: the device feeds them back itself
(epmoe/engine/decode_step.py). So the host learns one step late that a sequence has ended; the token of the step that
was launched meanwhile is dropped. It never exceeds what the sequence reserved, since an end by length is known
beforehand.

Every rank runs this loop with the same requests and makes the same choices, so that all of them call the model with the
same step; no choice depends on a clock. It knows token ids only; text listens through two callbacks.

Letters: T tokens of a step · B sequences of a step · O of them whose logits are wanted · V vocabulary.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

import torch

from epmoe.batch import HALVES_FROM, Step
from epmoe.cache.cache import Cache, CacheFull
from epmoe.engine.decode_step import Decoder, Model, State, Variant
from epmoe.engine.graphs import Graphs, with_bar
from epmoe.engine.request import OnFinish, OnToken, Request, Result, TokenLogprobs, check
from epmoe.engine.sampler import to_logprobs, top_logprobs
from epmoe.errors import UserError
from epmoe.layers.greedy import join_largest, largest
from epmoe.ranks.mesh import Ranks
from epmoe.ranks.transfer import Arrival, to_device


def choose_chunk(wanted: int, device: torch.device) -> int:
    """runtime.prefill_chunk; 0 is 16384 tokens on an accelerator, 2048 on a CPU.

    A product with the experts is the more efficient the more rows each expert has: 8192 tokens of 4 out of 32 experts
    are 1024 rows, of 128 experts 256. So many are half of a step (`Step.halves`), hence twice as many in a step. What a
    step holds beyond the weights grows with the chunk: for 16384 tokens of gpt-oss in bf16 three times a half's slot
    rows y [T, K, H] (of the other half, of the layer before, of this one), once its h [T·K, I] and gathered x, 0.19 GB
    each, and x, its norm, q, k and v 0.1 to 0.2 GB each. The choice follows the device's type alone, so that all
    machines cut prompts in the same places.
    """
    return wanted or (2048 if device.type == "cpu" else 16384)


@dataclass(eq=False)
class _Sequence:
    """A request in the cache."""

    index: int
    request: Request
    handle: int
    end: int  # length at which it must stop
    cached: int = 0  # tokens of the prompt that were fed
    launched: int = 0  # new tokens whose step was launched
    ids: list[int] = field(default_factory=list)  # new tokens that the host has read
    finished: bool = False
    first_token_s: float = 0.0
    logprobs: list[TokenLogprobs] = field(default_factory=list)

    @property
    def pending(self) -> int:
        """Tokens of the prompt that the model has not seen yet."""
        return len(self.request.ids) - self.cached

    @property
    def decodes(self) -> bool:
        """Whether the next decode step is to have it."""
        return not self.pending and len(self.request.ids) + self.launched < self.end


class _Flight:
    """New ids of some sequences on their way to the host, with the log-probabilities that were asked for."""

    def __init__(self, sequences: list[_Sequence], id_B: torch.Tensor, logits_BV: torch.Tensor | None) -> None:
        self.sequences = sequences
        self.asked = [row for row, each in enumerate(sequences) if each.request.params.logprobs]
        tensors = [id_B]
        if self.asked:
            assert logits_BV is not None
            row_O = to_device(self.asked, torch.int64, id_B.device)
            top = max(sequences[row].request.params.logprobs for row in self.asked)
            chosen_O = id_B[row_O].clamp(max=logits_BV.shape[1] - 1)  # NaN logits have chosen no token
            tensors += top_logprobs(logits_BV[row_O], chosen_O, top)
        self.arrival = Arrival(tensors)
        for sequence in sequences:
            sequence.launched += 1

    def land(self, timeout_s: float) -> Iterator[tuple[_Sequence, int, TokenLogprobs | None]]:
        """Each sequence's new id and its log-probabilities."""
        id_B, *found = self.arrival.wait(timeout_s)
        logprobs = dict(zip(self.asked, to_logprobs(*found), strict=True)) if found else {}
        for row, (sequence, token) in enumerate(zip(self.sequences, id_B.tolist(), strict=True)):
            yield sequence, token, logprobs.get(row)


class Engine:
    """Runs requests through a model.

    Args:
        eos_ids: ids that end a text, unless a request ignores them.
        prefill_chunk: prompt tokens in a step at most, of all sequences together; 0: see `choose_chunk`.
        max_batch: sequences at a time at most.
        graphs: decode steps are CUDA graphs; the tokens are the same without.
        timeout_s: how long the host waits for a step.
        progress: say on standard error what is prepared.
    """

    def __init__(
        self,
        model: Model,
        cache: Cache,
        ranks: Ranks,
        *,
        eos_ids: Sequence[int] = (),
        prefill_chunk: int = 0,
        max_batch: int = 64,
        graphs: bool = False,
        timeout_s: float = 60.0,
        progress: bool = False,
    ) -> None:
        assert prefill_chunk >= 0 and max_batch > 0
        self.model, self.cache, self.ranks = model, cache, ranks
        self.eos_ids = frozenset(eos_ids)
        self.prefill_chunk = choose_chunk(prefill_chunk, ranks.device)
        self.max_batch, self.timeout_s = min(max_batch, cache.sequences), timeout_s
        self.vocab: int = model.config.vocab
        self.max_positions: int = model.config.max_positions
        with torch.inference_mode():
            self.state = State(cache, self.vocab, ranks)
            self.decoder = Decoder(model, cache, self.state, self.max_batch)
        self.graphs = Graphs(self.decoder, ranks, capture=graphs, progress=progress)
        self.progress = progress
        self.warm: set[tuple[int, int]] = set()  # prefills that were run: tokens together, and of a prompt at most

    @torch.inference_mode()
    def prepare(self, requests: Sequence[Request]) -> None:
        """Whatever compiles or is captured for such requests is, now: `generate` does neither after it. A collective.

        Raises:
            UserError: see `check`; a request that the whole cache cannot hold.
        """
        check(requests, self.vocab, self.max_positions)
        if any(request.params.repetition_penalty != 1 for request in requests) and self.state.seen_SV is None:
            self.state.keep_seen()
            self.graphs.close()
        levels = {request.params.level for request in requests}
        logits = {bool(request.params.logprobs) for request in requests}
        if True in logits:
            self.decoder.keep_logits()
        if self.ranks.device.type != "cpu":
            self._warm_prefills(requests)
            # A prefill chooses from whole rows of logits, a decode step perhaps from parts; not each warm one chooses.
            nothing_1V = torch.zeros(1, self.vocab, device=self.ranks.device)
            join_largest(largest(nothing_1V, 0), self.vocab)
        self.graphs.prepare(min(self.max_batch, len(requests)), [Variant(*each) for each in product(levels, logits)])

    @torch.inference_mode()
    def generate(
        self,
        requests: Sequence[Request],
        on_token: OnToken = lambda request, token: False,
        on_finish: OnFinish = lambda request, result: None,
    ) -> list[Result]:
        """Run all requests to their end; results in their order. A collective of the expert group.

        Times in the results count from the moment when everything is prepared.

        Raises:
            UserError: see `prepare`; logits that are NaN.
            NoArrival: a step did not end in time.
        """
        self.prepare(requests)
        started, chunk = time.perf_counter(), self.prefill_chunk
        waiting = deque(enumerate(requests))
        running: list[_Sequence] = []
        flights: deque[_Flight] = deque()
        results: dict[int, Result] = {}
        try:
            while waiting or running:
                self._admit(waiting, running)
                launches = (self._prefill(_schedule(running, chunk, chunk)), self._decode(running))
                launched = [flight for flight in launches if flight]
                flights.extend(launched)
                while len(flights) > bool(launched):  # the newest stays in the air while the host reads the others
                    for sequence, token, logprobs in flights.popleft().land(self.timeout_s):
                        if sequence.finished:
                            continue  # it ended while this step was under way
                        now = time.perf_counter() - started
                        sequence.first_token_s = sequence.first_token_s or now
                        reason = self._append(sequence, token, logprobs, on_token)
                        if reason:
                            sequence.finished = True
                            running.remove(sequence)
                            self.cache.release(sequence.handle)
                            results[sequence.index] = _result(sequence, reason, now)
                            on_finish(sequence.index, results[sequence.index])
        finally:
            for sequence in running:
                self.cache.release(sequence.handle)
        return [results[index] for index in range(len(requests))]

    def _admit(self, waiting: deque[tuple[int, Request]], running: list[_Sequence]) -> None:
        """Move requests from `waiting` to `running`, in their order, while there are places and pages.

        All pages that a request can ever need are reserved now: a running sequence is never put back. A step that is
        under way may still write to pages whose sequence has ended; their new owner's steps come after it.
        """
        while waiting and len(running) < self.max_batch:
            index, request = waiting[0]
            try:
                handle = self.cache.admit(request.cached(self.max_positions))
            except CacheFull:
                assert running, "an empty cache refused a request"
                return
            waiting.popleft()
            self.state.admit(handle, request.ids, request.params)
            running.append(_Sequence(index, request, handle, request.length(self.max_positions)))

    def _prefill(self, work: list[tuple[_Sequence, int]]) -> _Flight | None:
        """One forward pass over so many tokens of each prompt; the first tokens of those that end with it."""
        if not work:
            return None
        logits_OV = self.model(_build(work, self.ranks.device), self.cache)
        for sequence, count in work:
            sequence.cached += count
        done = [sequence for sequence, _ in work if not sequence.pending]
        if not done:
            return None
        sequence_O = to_device([each.handle for each in done], torch.int64, self.ranks.device)
        position_O = to_device([len(each.request.ids) for each in done], torch.int64, self.ranks.device)
        id_O = self.state.choose(logits_OV, sequence_O, position_O, _variant(done).level)
        return _Flight(done, id_O, logits_OV)

    def _decode(self, running: list[_Sequence]) -> _Flight | None:
        """One decode step of all sequences that have begun and may go on."""
        rows = [sequence for sequence in running if sequence.decodes]
        if not rows:
            return None
        variant = _variant(rows)
        id_B = self.graphs.launch([each.handle for each in rows], variant)
        return _Flight(rows, id_B, self.decoder.logits_MV if variant.logits else None)

    def _append(self, sequence: _Sequence, token: int, logprobs: TokenLogprobs | None, on_token: OnToken) -> str:
        """Add a chosen token; the reason when it ends the sequence, else ""."""
        length = len(sequence.request.ids) + len(sequence.ids)
        if token == self.vocab:
            raise UserError(
                f"the model's logits are NaN at position {length - 1} of prompt {sequence.index + 1}: "
                "the checkpoint's weights hold NaN, or overflow in this runtime.dtype"
            )
        sequence.ids.append(token)
        if logprobs is not None:
            own = logprobs.top[: sequence.request.params.logprobs]
            sequence.logprobs.append(TokenLogprobs(logprobs.chosen, own))
        if token in self.eos_ids and not sequence.request.params.ignore_eos:
            return "eos"
        if on_token(sequence.index, token):
            return "stop"
        return "length" if length + 1 >= sequence.end else ""

    def _warm_prefills(self, requests: Sequence[Request]) -> None:
        """Run prefills of all kinds that these requests can lead to, so that each kernel they need is compiled.

        At the finest, kernels choose tiles by powers of two of a step's tokens, or of its prompts with several tokens,
        and are compiled anew for sizes that 16 divides.
        """
        # The longest prompts that fit: alone, without what follows them, so that as many do as in any later step.
        bare = [replace(each, params=replace(each.params, max_new_tokens=1)) for each in requests]
        longest = sorted(bare, key=lambda request: -len(request.ids))
        tokens = _powers(min(self.prefill_chunk, sum(len(request.ids) for request in longest[: self.max_batch])))
        several = sorted((each for each in bare if len(each.ids) > 1), key=lambda each: len(each.ids))[: self.max_batch]
        kinds = {(size, size) for size in (*tokens, *(size - 1 for size in tokens[1:]))}
        # From there on kernels see a step's halves. Whole, the largest that 16 divides, and the largest.
        if max(tokens, default=0) >= HALVES_FROM:
            kinds |= {(HALVES_FROM - less,) * 2 for less in (1, 16)}
        kinds |= {(2 * prompts, 2) for prompts in _powers(min(len(several), self.prefill_chunk // 2))}
        new = sorted(kinds - self.warm, reverse=True)  # the largest first, the others fit its memory
        for most, each in with_bar(new, "prefills", self.ranks, progress=self.progress):
            running = self._admit_fitting(longest if each == most else several, most, each)
            work = _schedule(running, most, each)
            ran = sum(count for _, count in work)
            kind = (ran, min(each, ran))  # a small cache holds less than was asked for
            if kind not in self.warm:
                flight = self._prefill(work)
                if flight:
                    list(flight.land(self.timeout_s))
                self.warm.add(kind)
            for sequence in running:
                self.cache.release(sequence.handle)

    def _admit_fitting(self, requests: Sequence[Request], most: int, each: int) -> list[_Sequence]:
        """Admit what fits, in this order, until their prompts have `most` tokens together, `each` of one at most."""
        running: list[_Sequence] = []
        found = 0
        for request in requests:
            if found >= most or len(running) == self.max_batch:
                break
            if self.cache.fits(request.cached(self.max_positions)):
                self._admit(deque([(len(running), request)]), running)
                found += min(each, len(request.ids))
        return running


def _powers(most: int) -> list[int]:
    """Powers of two up to `most`, and `most`; nothing below 1.

    >>> _powers(20), _powers(16), _powers(0)
    ([1, 2, 4, 8, 16, 20], [1, 2, 4, 8, 16], [])
    """
    found = [2**power for power in range(most.bit_length())]
    return found if most in (0, *found) else [*found, most]


def _schedule(running: list[_Sequence], most: int, each: int) -> list[tuple[_Sequence, int]]:
    """(sequence, how many tokens of its prompt): up to `each` of one, `most` together, in order of admission."""
    work = []
    for sequence in running:
        count = min(sequence.pending, most, each)
        if count:
            work.append((sequence, count))
            most -= count
    return work


def _variant(sequences: list[_Sequence]) -> Variant:
    params = [sequence.request.params for sequence in sequences]
    return Variant(max(each.level for each in params), any(each.logprobs for each in params))


def _build(work: list[tuple[_Sequence, int]], device: torch.device) -> Step:
    tokens: list[int] = []
    positions: list[int] = []
    starts, outputs = [0], []
    for sequence, count in work:
        span = range(sequence.cached, sequence.cached + count)
        tokens += sequence.request.ids[span.start : span.stop]
        positions += span
        starts.append(len(tokens))
        if count == sequence.pending:
            outputs.append(len(tokens) - 1)
    return Step(
        token_T=to_device(tokens, torch.int64, device),
        position_T=to_device(positions, torch.int64, device),
        start_B1=tuple(starts),
        cached_B=tuple(sequence.cached for sequence, _ in work),
        sequence_B=tuple(sequence.handle for sequence, _ in work),
        output_O=to_device(outputs, torch.int64, device),
    )


def _result(sequence: _Sequence, reason: str, now: float) -> Result:
    return Result(tuple(sequence.ids), reason, sequence.first_token_s, now, tuple(sequence.logprobs))
