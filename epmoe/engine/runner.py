"""Runner: what the scheduler decided, launched on this rank's device; ids come back in flights (flight.py).

Where ranks have requests of their own, the runner is told of the steps of all of them. It launches its own, of the
kind and size that all of them have together, and where it has nothing to do a step of nobody's tokens: the experts of a
layer are all ranks', and each waits for the others there.

Letters: M the most rows · W words of allowed ids.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch

from epmoe.cache.cache import Cache
from epmoe.engine import sequence as engine
from epmoe.engine.flight import Awaited, Flight
from epmoe.engine.matcher import Grammars, Matcher
from epmoe.engine.planned import Planned, planned
from epmoe.engine.ragged import Drafts, Ragged
from epmoe.engine.request import Variant
from epmoe.engine.scores import scored
from epmoe.engine.sequence import Piece, Work
from epmoe.engine.state import State
from epmoe.engine.step import Sizes, StaticStep
from epmoe.models import DraftModel, Model
from epmoe.ranks.mesh import Ranks
from epmoe.ranks.transfer import staging

Sequences = Sequence[engine.Sequence]


class Launcher(Protocol):
    """Starts the parts of a step, as graphs or not: a decode, or what leads to a head and then that.

    `decode` and `head` give the new ids, on the device until the next step. `most` and `every` are of all ranks.
    """

    def decode(self, handles: Sequence[int], variant: Variant) -> torch.Tensor: ...
    def rows(self, handles: Sequence[int], most: int) -> None: ...
    def ragged(self, ragged: Ragged, every: Sequence[Ragged]) -> None: ...
    def head(self, outputs: int, variant: Variant) -> torch.Tensor: ...
    def propose(self, ragged: Ragged, most: Sequence[tuple[int, int]]) -> torch.Tensor: ...


class Started(NamedTuple):
    """A step that has begun."""

    plans: Sequence[Planned]  # of all ranks
    own: Planned
    id_B: torch.Tensor | None  # the ids, where it is launched whole

    @property
    def chosen(self) -> Sequence[int]:
        """Handles by whose parameters the ids are."""
        ragged = self.own.ragged
        return (ragged and ragged.chosen) or [each.handle for each in self.own.sequences]


class Runner:
    """A model, its cache and what the device knows of each sequence. Its methods are collectives of the expert group.

    Args:
        ranks: where rows of experts and results come together.
        sizes: of a step that is a graph, at most.
        drafter: that drafts; None: nothing is trained to.
        own: whether each rank has requests of its own.
    """

    def __init__(
        self,
        model: Model,
        cache: Cache,
        ranks: Ranks,
        sizes: Sizes,
        drafter: DraftModel | None = None,
        *,
        own: bool = False,
    ) -> None:
        self.model, self.cache, self.score_rows = model, cache, sizes.score_rows
        self.lane = ranks.expert_rank if own else 0
        self.told_to = ranks if own else None  # what comes of a step
        # Of requests of its own a rank chooses the ids alone.
        choosing = replace(ranks, expert_rank=0, expert_size=1, expert_group=None) if own else ranks
        self.state = State(cache, model.config.vocab, choosing, sizes.drafted_rows)
        self.masks_MW: torch.Tensor | None = None  # on the host
        self.others_MW: torch.Tensor | None = None  # where other ranks' masks are made, and read by nobody
        self.static = StaticStep(model, cache, self.state, sizes, drafter)

    def admit(self, sequence: engine.Sequence, ends: Iterable[int] = ()) -> None:
        """Tell the device of a sequence that begins: its parameters, and its ids where they count.

        `ends` are those that end its answer.
        """
        self.state.admit(sequence.handle, sequence.prompt, sequence.request.params, sequence.ids, ends)

    def launch(self, rows: Sequences, work: Sequence[Piece], launcher: Launcher) -> Flight | None:
        """One step that all ranks make alike: the next token of each row, and so many tokens of each prompt; the ids
        that it gives."""
        (own,) = planned([Work(list(rows), list(work), [], modelled=self.static.proposer is not None)])
        started = self._begin([own] * (self.told_to.expert_size if self.told_to else 1), own, launcher)
        return started and self._finish(started._replace(plans=[own]), launcher, None)

    def begin(self, works: Sequence[Work], launcher: Launcher) -> Started | None:
        """Launch a step up to its head, or whole where nothing adjusts its logits, nobody drafts and all ranks have the
        same. None: nothing comes of it, on any rank."""
        plans = planned(works)
        return self._begin(plans, plans[self.lane], launcher)

    def _begin(self, plans: Sequence[Planned], own: Planned, launcher: Launcher) -> Started | None:
        ragged, sequences, variant = own.ragged, own.sequences, own.variant
        if not ragged:
            self.cache.write()  # else the launcher does, with what the step has to know
        if not any(plan.work.rows or plan.work.pieces for plan in plans):
            return None
        id_B, most = None, max(len(plan.sequences) for plan in plans)
        if ragged:
            branched = own.work.drafts if variant and variant.adjusted else {}
            if branched:
                ragged.chosen.extend(self._chosen(ragged, branched))
            launcher.ragged(ragged, [plan.ragged for plan in plans if plan.ragged])
            if branched:  # while the step runs up to its head
                self.state.branch([(each.handle, draft, bool(each.matcher)) for each, draft in branched.items()])
        elif variant and not variant.adjusted and self.told_to is None:
            id_B = launcher.decode([each.handle for each in sequences], variant)
        else:
            # Ranks with requests of their own choose in other ways, or nothing; but whoever replays collectives of NCCL
            # must replay one capture on all ranks.
            launcher.rows([each.handle for each in sequences], most)
        return Started(plans, own, id_B) if any(plan.brings for plan in plans) else None

    def _chosen(self, ragged: Ragged, drafts: Drafts) -> list[int]:
        """For each output a handle by whose parameters it is chosen: in a draft one that knows the tokens before."""
        branches = iter(self.state.branches(sum(map(len, drafts.values()))))
        outputs = zip(ragged.ended, ragged.ahead, strict=True)
        return [next(branches) if ahead else each.handle for each, ahead in outputs]

    def mask(self, started: Started, sequences: Sequences, grammars: Grammars) -> None:
        """Let the next tokens of these be what their grammars allow; nobody's masks may be under way still.

        Of other ranks' sequences masks are made, too: a grammar may fail at one, and then it has on every host.
        """
        words = self.state.allowed_SW
        assert words is not None, "State.keep was not called"
        if self.masks_MW is None:
            self.masks_MW = staging(words[: len(self.static.id_M)])
        masked = set(sequences)
        for plan in started.plans:
            asked = [(each.matcher, plan.work.drafts.get(each, ())) for each in plan.restricted if each in masked]
            known = [(matcher, draft) for matcher, draft in asked if matcher]
            if plan is not started.own:
                self._fill_others(known, grammars)
            elif known:
                rows = grammars.fill(known, self.masks_MW)
                outputs = zip(plan.sequences, started.chosen, strict=True)
                self.state.mask([handle for each, handle in outputs if each in masked], self.masks_MW[:rows])

    def _fill_others(self, asked: Sequence[tuple[Matcher, Sequence[int]]], grammars: Grammars) -> None:
        assert self.masks_MW is not None
        if asked and self.others_MW is None:
            self.others_MW = torch.empty_like(self.masks_MW)
        if asked:
            grammars.fill(asked, self.others_MW)

    def finish(self, started: Started, launcher: Launcher) -> Flight:
        """Launch the rest of a step, after which no other one has begun."""
        return self._finish(started, launcher, self.told_to)

    def _finish(self, started: Started, launcher: Launcher, ranks: Ranks | None) -> Flight:
        """`ranks`: which tell each other what has come."""
        own, id_B = started.own, started.id_B
        work, variant, scores = own.work, own.variant, own.scores
        if id_B is None:
            id_B = launcher.head(len(own.sequences), variant) if variant else self.static.id_M[:0]
        found = scored(self.model, self.static.take_scored(), scores, self.score_rows) if scores else ()
        draft_BK = None
        if work.modelled and own.ragged:
            draft_BK = launcher.propose(own.ragged, [(each.handle, most) for each, most in work.told.items()])
        logits_MV = self.static.logits_MV if variant and variant.logits else None
        awaited = [Awaited.of(plan) for plan in started.plans]
        mine = Awaited.of(own)
        tensors = mine.tensors(id_B, logits_MV, found, draft_BK if mine.told else None)
        return Flight(awaited, tensors, self.model.config.vocab, ranks)
