"""Replicas: requests that come together, shared out among the replicas of a model; each answers its own.

    every rank has all requests ─▶ shares ─▶ its replica's own ─▶ Engine.generate ─┬─▶ early.py: rank 0, at once
    listeners hear of all, as if one had answered them ◀── each replica's outcome ◀┘

A request's tokens are the same bits wherever it is answered, so that nobody can tell how they were shared out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import msgspec

from epmoe.engine.diagnose import NotFinite
from epmoe.engine.early import Answered, Early
from epmoe.engine.engine import Engine
from epmoe.engine.request import OnFinish, OnToken, Request, Result


@dataclass
class Failed:
    """What `NotFinite` says, of requests by their index."""

    indices: list[int]
    position: int
    where: str


@dataclass
class Outcome:
    """What has come of a replica's share, in the order of its requests' ends."""

    answered: list[Answered] = field(default_factory=list)
    failed: Failed | None = None


_outcome = msgspec.msgpack.Decoder(Outcome)


def shares(requests: Sequence[Request], replicas: int, max_positions: int) -> list[list[int]]:
    """Each replica's requests, by index: the longest ones first, each to whichever has the fewest tokens so far."""
    lengths = [each.length(max_positions) for each in requests]
    found: list[list[int]] = [[] for _ in range(replicas)]
    tokens = [0] * replicas
    for index in sorted(range(len(requests)), key=lambda each: -lengths[each]):
        replica = tokens.index(min(tokens))
        found[replica].append(index)
        tokens[replica] += lengths[index]
    return [sorted(each) for each in found]


def own_share(engine: Engine, requests: Sequence[Request]) -> list[int]:
    """This rank's replica's requests, by index."""
    return shares(requests, engine.ranks.replicas, engine.max_positions)[engine.ranks.replica]


def prepare(engine: Engine, requests: Sequence[Request]) -> None:
    """`Engine.prepare_for` what `generate` will answer here; a collective of all ranks."""
    if mine := [requests[index] for index in own_share(engine, requests)]:
        engine.prepare_for(mine)


def generate(
    engine: Engine,
    requests: Sequence[Request],
    on_token: OnToken = lambda request, token: False,
    on_finish: OnFinish = lambda request, result: None,
    on_launch: Callable[[], object] = lambda: None,
) -> list[Result]:
    """`Engine.generate`, by all replicas; a collective of all ranks.

    Listeners hear of the own replica's requests as they run. Of another's they hear when all have ended; on rank 0 when
    each has. `on_launch` is called before them on every rank.

    Raises:
        as `Engine.generate`, on every rank alike.
    """
    if engine.ranks.replicas == 1:
        return engine.generate(requests, on_token, on_finish, on_launch)
    check(engine, requests)
    engine.ranks.meet("replicas")  # whose kernels may have taken longer to compile
    batch = _Batch(engine, requests, on_token, on_finish)
    batch.answer(on_launch)
    return batch.results()


class _Batch:
    """One call of `generate`."""

    def __init__(self, engine: Engine, requests: Sequence[Request], on_token: OnToken, on_finish: OnFinish) -> None:
        self.engine, self.requests, self.on_token, self.on_finish = engine, requests, on_token, on_finish
        self.mine = own_share(engine, requests)
        self.told: list[list[int]] = [[] for _ in self.mine]
        self.outcome = Outcome()
        self.heard: set[int] = set()  # requests of which the listeners know all
        self.early = Early(engine.ranks)

    def answer(self, on_launch: Callable[[], object]) -> None:
        """The own share; a collective of the replica."""
        if not self.mine:
            on_launch()
            return
        mine = [self.requests[index] for index in self.mine]
        try:
            self.engine.generate(mine, self._token, self._finish, on_launch)
        except NotFinite as error:
            self.outcome.failed = Failed([self.mine[each - 1] for each in error.prompts], error.position, error.where)

    def results(self) -> list[Result]:
        """Of all, once every replica has ended; a collective of all ranks."""
        self._hear_others(all_of_them=True)
        self.early.close()
        ranks = self.engine.ranks
        ranks.meet_after_work("answers")
        outcomes = [_outcome.decode(each) for each in ranks.across_replicas(msgspec.msgpack.encode(self.outcome))]
        found: dict[int, Result] = {}
        for each in outcomes:
            for answered in each.answered:
                self._hear(answered)
                found[answered.index] = _result(answered)
        failed = [each.failed for each in outcomes if each.failed]
        if failed:
            first = min(failed, key=lambda each: each.indices)
            prompts = sorted(1 + index for each in failed for index in each.indices)
            raise NotFinite(prompts, first.position, first.where)
        return [found[index] for index in range(len(self.requests))]

    def _token(self, number: int, token: int) -> bool:
        self.told[number].append(token)
        return self.on_token(self.mine[number], token)

    def _finish(self, number: int, result: Result) -> None:
        answered = Answered(self.mine[number], self.told[number], result)
        self.outcome.answered.append(answered)
        self.early.tell(answered)
        self.heard.add(answered.index)
        self.on_finish(answered.index, result)
        self._hear_others(all_of_them=False)

    def _hear_others(self, *, all_of_them: bool) -> None:
        for answered in self.early.come(all_of_them=all_of_them):
            self._hear(answered)

    def _hear(self, answered: Answered) -> None:
        """Let the listeners know all of it, if they do not."""
        if answered.index in self.heard:
            return
        self.heard.add(answered.index)
        for token in answered.told:
            self.on_token(answered.index, token)
        self.on_finish(answered.index, _result(answered))


def _result(answered: Answered) -> Result:
    return replace(answered.result, prompt_logprobs=tuple(answered.result.prompt_logprobs))  # on their way a list


def check(engine: Engine, requests: Sequence[Request]) -> None:
    """Raises UserError, on every rank alike, for what `Engine.generate` would refuse on those of one replica alone."""
    engine.check(requests)
    for number, each in enumerate(requests, 1):
        engine.cache.pages.check(each.cached(engine.max_positions))
        engine.matcher(each, number)
