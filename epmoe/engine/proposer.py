"""A draft model on the device, a trained head (EAGLE3): it goes over what a step has fed, and drafts what comes next.

    step      feeds tokens at positions p p+1 …, chooses ids; three layers' streams are their features
    extend    (feature of p, token of p+1), (feature of p+1, token of p+2) …      keys and values of p, p+1 …
    propose   from each sequence's last position on, K times: (its own stream, its own token)

What it drafts are rows of the next step as any draft's (drafts.py), so it changes no bit of an answer. All of it lies
in buffers that stay where they are, so that `extend` and `propose` can be CUDA graphs.

Letters: T tokens of a step · O outputs · B sequences that are drafted for · M the most of either · S handles of the
cache · X columns of a token's features · H hidden · K drafted tokens.
"""

from collections.abc import Sequence

import torch

from epmoe.batch import Step
from epmoe.cache.cache import Cache
from epmoe.engine.ragged import Ragged
from epmoe.engine.state import State
from epmoe.models import DraftModel, Model
from epmoe.ranks.transfer import Stage, to_device

DEPTH = 4  # K


class Proposer:
    """Runs a draft model behind a step's parts. Its methods are collectives where they say so.

    Args:
        sizes: outputs of a step, and tokens of one that is a graph, at most.
    """

    def __init__(self, drafter: DraftModel, model: Model, cache: Cache, state: State, sizes: tuple[int, int]) -> None:
        self.drafter, self.model, self.cache, self.state = drafter, model, cache, state
        model.feature_layers = drafter.config.layers
        (rows, tokens), device = sizes, cache.device
        self.tokens, self.rows = tokens, rows
        hidden, dtype = model.config.hidden, cache.config.dtype
        self.feature_TX = torch.zeros(tokens, len(drafter.config.layers) * hidden, dtype=dtype, device=device)
        self.hidden_MH = torch.zeros(rows, hidden, dtype=dtype, device=device)  # the draft model's, of the outputs
        self.at_S = torch.zeros(state.spare + 1, dtype=torch.int64, device=device)  # token of a sequence's last output
        self.draft_MK = torch.zeros(rows, DEPTH, dtype=torch.int64, device=device)
        # What the host orders: the token behind each one, where it is known; the outputs' tokens, those beyond them the
        # one that is nobody's; handles, and up to which position each has pages.
        self.parts = [tokens + 2 - tokens % 2, *[rows + rows % 2] * 3]
        self.order = torch.zeros(sum(self.parts), dtype=torch.int64, device=device)
        self.stage = Stage(self.order, self.parts)
        behind, *of_M = self.order.split(self.parts)
        self.behind_T = behind[: tokens + 1]
        self.output_M, self.handle_M, self.most_M = (each[:rows] for each in of_M)

    def order_step(self, ragged: Ragged, most: Sequence[tuple[int, int]]) -> None:
        """Tell `extend` and `propose` what to do.

        Args:
            most: handles of the sequences to draft for, and the highest position that each has a page for.
        """
        behind_T, output_M, handle_M, most_M = self.stage.begin()
        if len(ragged.behind) <= self.tokens:  # else `extend` is told
            behind_T[: len(ragged.behind)] = ragged.behind
        output_M[:] = self.tokens
        output_M[: len(ragged.outputs)] = ragged.outputs
        handle_M[:] = self.state.spare
        if most:
            handle_M[: len(most)], most_M[: len(most)] = zip(*most, strict=True)
        self.stage.send()

    def keep(self) -> None:
        """Take over the features of the step that has just run, before another one overwrites them."""
        feature_TX = self.model.feature_TX
        assert feature_TX is not None
        if len(feature_TX) <= self.tokens:  # else `extend_known` finds them where they are
            self.feature_TX[: len(feature_TX)] = feature_TX

    def extend(self, step: Step, id_M: torch.Tensor, ended_M: torch.Tensor) -> None:
        """Go over a step's tokens, whose ids are chosen.

        Args:
            id_M: the ids, -1 for those that do not count.
            ended_M: handles of the outputs.
        """
        tokens, outputs = len(step.token_T), min(len(step.token_T), self.rows)
        self.behind_T.index_copy_(0, self.output_M[:outputs], self._tokens(id_M[:outputs]))
        self._extend(step, self.behind_T[:tokens], self.feature_TX[:tokens], id_M[:outputs], ended_M[:outputs])

    def extend_known(self, step: Step, ragged: Ragged, id_M: torch.Tensor, ended_M: torch.Tensor) -> None:
        """The same for a step of any size, which the host knows."""
        outputs, feature_TX = len(ragged.outputs), self.model.feature_TX
        assert feature_TX is not None
        behind_T = to_device(ragged.behind, torch.int64, id_M.device)
        output_O = to_device(ragged.outputs, torch.int64, id_M.device)
        self.output_M[:outputs] = output_O
        behind_T.index_copy_(0, output_O, self._tokens(id_M[:outputs]))
        self._extend(step, behind_T, feature_TX, id_M[:outputs], ended_M[:outputs])

    def _tokens(self, id_O: torch.Tensor) -> torch.Tensor:
        """Ids of which the head can take each: what does not count, or is none since logits were not finite, too."""
        return id_O.clamp(0, self.state.vocab - 1)

    def _extend(
        self, step: Step, behind_T: torch.Tensor, feature_TX: torch.Tensor, id_O: torch.Tensor, ended_O: torch.Tensor
    ) -> None:
        plan = self.cache.plan(step)[None]
        hidden_TH = self.drafter(behind_T, self.drafter.fuse(feature_TX), step.position_T, self.cache.draft, plan)
        outputs = len(id_O)
        self.hidden_MH[:outputs] = hidden_TH[self.output_M[:outputs].clamp(max=len(hidden_TH) - 1)]
        # A sequence's last output that counts: the next one is another's, or does not.
        counts_O = id_O >= 0
        goes_on_O = torch.zeros_like(counts_O)
        goes_on_O[:-1] = (ended_O[1:] == ended_O[:-1]) & counts_O[1:]
        last_O = counts_O & ~goes_on_O
        place_O = torch.arange(outputs, device=id_O.device)
        self.at_S[torch.where(last_O, ended_O, self.state.spare)] = place_O

    def propose(self, rows: int) -> None:
        """K tokens for the first so many of the handles, in `draft_MK`. A collective: they are rank 0's."""
        handle_B, most_B = self.handle_M[:rows], self.most_M[:rows]
        hidden_BH = self.hidden_MH[self.at_S[handle_B]]
        position_B, draft_BK = self.state.sequences.position_S[handle_B], self.draft_MK[:rows]
        draft_BK[:, 0] = token_B = self.drafter.propose(hidden_BH)
        for ahead in range(DEPTH - 1):
            # One without a page writes over its last one: what it drafts from there on means little.
            step = Step(token_B, torch.minimum(position_B + ahead, most_B), handle_B)
            plan = self.cache.plan(step)[None]
            hidden_BH = self.drafter(token_B, hidden_BH, step.position_T, self.cache.draft, plan)
            draft_BK[:, ahead + 1] = token_B = self.drafter.propose(hidden_BH)
        self.state.ranks.broadcast(draft_BK)
