"""Replicas: requests that come together, shared out among the replicas of a model; each answers its own.

    every rank has all requests ─▶ shares ─▶ its replica's own ─▶ Engine.generate ─┐
    listeners hear of all, as if one had answered them ◀── each replica's outcome ◀┘

A request's tokens are the same bits wherever it is answered, so that nobody can tell how they were shared out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import msgspec

from epmoe.engine.diagnose import NotFinite
from epmoe.engine.engine import Engine
from epmoe.engine.request import OnFinish, OnToken, Request, Result


@dataclass
class Answered:
    """What listeners hear of one request."""

    index: int
    told: list[int]  # its tokens, one call each
    result: Result


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
) -> list[Result]:
    """`Engine.generate`, by all replicas; a collective of all ranks.

    Listeners hear of the own replica's requests as they run, and of the others' once all have ended.

    Raises:
        as `Engine.generate`, on every rank alike.
    """
    ranks = engine.ranks
    if ranks.replicas == 1:
        return engine.generate(requests, on_token, on_finish)
    check(engine, requests)
    found = outcome(engine, requests, on_token, on_finish)
    ranks.meet_after_work("answers")
    outcomes = [_outcome.decode(each) for each in ranks.across_replicas(msgspec.msgpack.encode(found))]
    results: dict[int, Result] = {}
    for replica, each in enumerate(outcomes):
        for answered in each.answered:
            scores = tuple(answered.result.prompt_logprobs)  # on their way a list
            results[answered.index] = result = replace(answered.result, prompt_logprobs=scores)
            if replica != ranks.replica:
                for token in answered.told:
                    on_token(answered.index, token)
                on_finish(answered.index, result)
    failed = [each.failed for each in outcomes if each.failed]
    if failed:
        first = min(failed, key=lambda each: each.indices)
        prompts = sorted(1 + index for each in failed for index in each.indices)
        raise NotFinite(prompts, first.position, first.where)
    return [results[index] for index in range(len(requests))]


def check(engine: Engine, requests: Sequence[Request]) -> None:
    """Raises UserError, on every rank alike, for what `Engine.generate` would refuse on those of one replica alone."""
    engine.check(requests)
    for number, each in enumerate(requests, 1):
        engine.cache.pages.check(each.cached(engine.max_positions))
        engine.matcher(each, number)


def outcome(engine: Engine, requests: Sequence[Request], on_token: OnToken, on_finish: OnFinish) -> Outcome:
    """Answer the own share; a collective of the replica."""
    mine, found = own_share(engine, requests), Outcome()
    told: list[list[int]] = [[] for _ in mine]

    def token(number: int, token: int) -> bool:
        told[number].append(token)
        return on_token(mine[number], token)

    def finish(number: int, result: Result) -> None:
        found.answered.append(Answered(mine[number], told[number], result))
        on_finish(mine[number], result)

    try:
        if mine:
            engine.generate([requests[index] for index in mine], token, finish)
    except NotFinite as error:
        found.failed = Failed([mine[each - 1] for each in error.prompts], error.position, error.where)
    return found
