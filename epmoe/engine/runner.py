"""Runner: what the scheduler decided, launched on this rank's device; ids come back in flights.

Letters: B sequences whose ids come · O of them whose log-probabilities are wanted · V vocabulary.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch

from epmoe.cache.cache import Cache
from epmoe.engine import sequence as engine
from epmoe.engine.matcher import Grammars
from epmoe.engine.ragged import Drafts, Ragged, Score
from epmoe.engine.request import TokenLogprobs, Variant
from epmoe.engine.sampler import to_logprobs, top_logprobs
from epmoe.engine.scores import deliver, scored
from epmoe.engine.sequence import Piece, Work
from epmoe.engine.state import State
from epmoe.engine.step import Sizes, StaticStep
from epmoe.models import DraftModel, Model
from epmoe.ranks.mesh import Ranks
from epmoe.ranks.transfer import Arrival, staging, to_device

Sequences = Sequence[engine.Sequence]
Prompts = tuple[Sequence[Score], Sequence[torch.Tensor]]
Told = tuple[Sequences, torch.Tensor | None]
Landed = tuple[engine.Sequence, int, TokenLogprobs | None]


class Flight:
    """New ids of some sequences on their way to the host, with the log-probabilities that were asked for.

    Args:
        sequences: of the ids; several in a row are of one that has a draft.
        told: sequences, and what a draft model says of their next tokens, [sequences, K].
        prompts: `scores` of prompts' tokens, and what `scores.scored` has found of them.
    """

    def __init__(
        self, sequences: Sequences, id_B: torch.Tensor, logits_BV: torch.Tensor | None, prompts: Prompts, told: Told
    ) -> None:
        self.sequences, (self.scores, found), (self.told, draft_BK) = sequences, prompts, told
        self.waits = bool(self.told) or len(set(sequences)) < len(sequences)  # the next step's rows follow from it
        self.asked = [row for row, each in enumerate(sequences) if each.request.params.logprobs]
        tensors = [id_B]
        if self.asked:
            assert logits_BV is not None
            top = max(sequences[row].request.params.logprobs for row in self.asked)
            logits_OV, id_O = logits_BV[: len(sequences)], id_B
            if len(self.asked) < len(sequences):  # a row of logits takes as long to copy as to look at
                row_O = to_device(self.asked, torch.int64, id_B.device)
                logits_OV, id_O = logits_BV[row_O], id_B[row_O]
            # Logits that are not finite have chosen no token, and what does not count means nothing.
            chosen_O = id_O.clamp(0, logits_BV.shape[1] - 1)
            tensors += top_logprobs(logits_OV, chosen_O, top)
        self.arrival = Arrival([*tensors, *found, *([draft_BK] if draft_BK is not None else ())])
        self.drafts: list[list[int]] = []  # of those in `told`, once it has landed

    def land(self, timeout_s: float) -> Iterator[Landed]:
        """Each sequence's new id and its log-probabilities, once sequences have those of their prompts.

        Of one with a draft all that it may bring, in order; -1 are those that do not count.

        Raises:
            NoArrival: the step did not end in time.
        """
        id_B, *found = self.arrival.wait(timeout_s)
        if self.told:
            self.drafts = found.pop().tolist()
        if self.scores:
            deliver(self.scores, found[-3:])
            del found[-3:]
        logprobs = dict(zip(self.asked, to_logprobs(*found), strict=True)) if found else {}
        for row, (sequence, token) in enumerate(zip(self.sequences, id_B.tolist(), strict=True)):
            yield sequence, token, logprobs.get(row)


class Launcher(Protocol):
    """Starts the parts of a step, as graphs or not: a decode, or what leads to a head and then that.

    `decode` and `head` give the new ids, on the device until the next step.
    """

    def decode(self, handles: Sequence[int], variant: Variant) -> torch.Tensor: ...
    def rows(self, handles: Sequence[int]) -> None: ...
    def ragged(self, ragged: Ragged) -> None: ...
    def head(self, outputs: int, variant: Variant) -> torch.Tensor: ...
    def propose(self, ragged: Ragged, most: Sequence[tuple[int, int]]) -> torch.Tensor: ...


class Started(NamedTuple):
    """A step that has begun."""

    sequences: Sequences  # whose next ids it is to choose
    work: Work
    ragged: Ragged | None  # None: it has nothing but rows, which the device knows
    variant: Variant | None  # how; None: there are none
    scores: Sequence[Score]
    id_B: torch.Tensor | None  # the ids, where it is launched whole

    @property
    def chosen(self) -> Sequence[int]:
        """Handles by whose parameters the ids are."""
        return (self.ragged and self.ragged.chosen) or [each.handle for each in self.sequences]

    @property
    def restricted(self) -> list[engine.Sequence]:
        """Those that need the masks of their grammars before its head."""
        adjusted = self.variant is not None and self.variant.adjusted
        return [each for each in dict.fromkeys(self.sequences) if each.matcher] if adjusted else []


class Runner:
    """A model, its cache and what the device knows of each sequence. Its methods are collectives of the expert group.

    Args:
        sizes: of a step that is a graph, at most.
        score_rows: logits of prompts' tokens are made of so many rows at a time, at most.
    """

    def __init__(
        self,
        model: Model,
        cache: Cache,
        ranks: Ranks,
        sizes: Sizes,
        score_rows: int,
        drafter: DraftModel | None = None,
    ) -> None:
        self.model, self.cache, self.ranks, self.score_rows = model, cache, ranks, score_rows
        self.state = State(cache, model.config.vocab, ranks, sizes.drafted_rows)
        self.masks_MW: torch.Tensor | None = None  # on the host
        self.static = StaticStep(model, cache, self.state, sizes, drafter)

    def admit(self, sequence: engine.Sequence, ends: Iterable[int] = ()) -> None:
        """Tell the device of a sequence that begins: its parameters, and its ids where they count.

        `ends` are those that end its answer.
        """
        self.state.admit(sequence.handle, sequence.prompt, sequence.request.params, sequence.ids, ends)

    def launch(self, rows: Sequences, work: Sequence[Piece], launcher: Launcher) -> Flight | None:
        """One step: the next token of each row, and so many tokens of each prompt; the ids that it gives."""
        modelled = self.static.proposer is not None
        started = self.begin(Work(list(rows), list(work), [], modelled=modelled), launcher)
        return started and self.finish(started, launcher)

    def begin(self, work: Work, launcher: Launcher) -> Started | None:
        """Launch a step up to its head, or whole where nothing adjusts its logits and nobody drafts. None: nothing
        comes of it."""
        rows, drafts = work.rows, work.drafts
        listed = bool(work.pieces or drafts or (rows and work.modelled))
        if not listed:
            self.cache.write()  # else the launcher does, with what the step has to know
        if not (rows or work.pieces):
            return None
        ragged = Ragged.of(rows, work.pieces, drafts) if listed else None
        sequences, scores = (ragged.ended, ragged.scores) if ragged else (rows, ())
        variant = Variant.joined([each.request.variant for each in sequences]) if sequences else None
        id_B = None
        if ragged and drafts and variant and variant.adjusted:
            ragged.chosen.extend(self._branch(ragged, drafts))
        if ragged:
            launcher.ragged(ragged)
        elif variant and variant.adjusted:
            launcher.rows([each.handle for each in rows])
        elif variant:
            id_B = launcher.decode([each.handle for each in rows], variant)
        started = Started(sequences, work, ragged, variant, scores, id_B)
        for sequence, tokens in work.pieces:
            sequence.cached += tokens
        for sequence in dict.fromkeys(sequences):
            sequence.launched += 1
        for sequence, places in scores:
            sequence.scored += len(places)
        return started if sequences or scores or work.modelled else None

    def _branch(self, ragged: Ragged, drafts: Drafts) -> list[int]:
        """For each output a handle by whose parameters it is chosen: in a draft one that knows the tokens before."""
        branches = iter(self.state.branch([(each.handle, draft) for each, draft in drafts.items()]))
        outputs = zip(ragged.ended, ragged.ahead, strict=True)
        return [next(branches) if ahead else each.handle for each, ahead in outputs]

    def mask(self, started: Started, sequences: Sequences, grammars: Grammars) -> None:
        """Let the next tokens of these be what their grammars allow; nobody's masks may be under way still."""
        words = self.state.allowed_SW
        assert words is not None, "State.keep was not called"
        if self.masks_MW is None:
            self.masks_MW = staging(words[: len(self.static.id_M)])
        asked = [(each.matcher, started.work.drafts.get(each, ())) for each in sequences if each.matcher]
        rows = grammars.fill(asked, self.masks_MW)
        masked = set(sequences)
        outputs = zip(started.sequences, started.chosen, strict=True)
        self.state.mask([handle for each, handle in outputs if each in masked], self.masks_MW[:rows])

    def finish(self, started: Started, launcher: Launcher) -> Flight:
        """Launch the rest of a step, after which no other one has begun."""
        sequences, work, ragged, variant, scores, id_B = started
        if id_B is None:
            id_B = launcher.head(len(sequences), variant) if variant else self.static.id_M[:0]
        found = scored(self.model, self.static.take_scored(), scores, self.score_rows) if scores else ()
        told: Told = (), None
        if work.modelled and ragged:
            draft_BK = launcher.propose(ragged, [(each.handle, most) for each, most in work.told.items()])
            told = (list(work.told), draft_BK) if work.told else told
        logits_MV = self.static.logits_MV if variant and variant.logits else None
        return Flight(sequences, id_B, logits_MV, (scores, found), told)
