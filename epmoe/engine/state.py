"""What the device knows of every sequence: its last token and position, its parameters, what adjusts its logits.

A draft's rows have been adjusted as if the tokens before them had come: each has a copy of its sequence's state, with
these tokens, at a handle of its own, beyond those of the cache (`branch`).

Letters: B rows of a step · S handles of the cache, and as many more as rows can be drafted · V vocabulary · W words of
allowed ids.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from epmoe.batch import Adjustments, Drafted, Listed, SequenceState
from epmoe.cache.cache import Cache
from epmoe.engine.adjust import Entry, entries, packed, words
from epmoe.engine.request import MOST_LISTED, Level, SamplingParams, Variant
from epmoe.engine.sampler import kind, sample, sampling_tensors
from epmoe.layers.twin import twin
from epmoe.ranks.mesh import Ranks
from epmoe.ranks.transfer import to_device
from epmoe.trace import named


class State:
    """By a sequence's handle in the cache; the spare one stays at position 0.

    Args:
        branches: rows of drafts that a step may have.
    """

    def __init__(self, cache: Cache, vocab: int, ranks: Ranks, branches: int = 0) -> None:
        count, device = cache.spare + 1 + branches, ranks.device
        self.spare, self.count, self.vocab, self.ranks = cache.spare, count, vocab, ranks
        token_S, position_S = (torch.zeros(cache.spare + 1, dtype=torch.int64, device=device) for _ in range(2))
        self.sequences = SequenceState(token_S, position_S, seen_SV=None)
        self.params_S = sampling_tensors([SamplingParams()] * count, device)
        self.told: dict[int, tuple[Any, ...]] = {}  # what these and `penalty_S3` hold of each handle
        self.kept = frozenset[str]()  # what is kept besides, for adjustments
        self.penalty_S3 = torch.tensor([[1.0, 0.0, 0.0]] * count, device=device)
        self.listed: Listed | None = None
        self.allowed_SW: torch.Tensor | None = None
        self.lists: set[int] = set()  # handles with entries in `listed`
        self.masked: set[int] = set()  # handles some of whose bits in `allowed_SW` are not set

    def keep(self, wanted: frozenset[str]) -> bool:
        """Keep these from now on (`SamplingParams.kept`); whether that is new: a graph that was captured does without.

        Of 201,088 ids and 64 sequences 52 MB for "count", 13 for "seen", less than 2 for each of the others. With
        drafts, of which 256 rows have as much each, it is five times that.
        """
        count, device = self.count, self.ranks.device
        new = wanted - self.kept
        if "seen" in new:
            self.sequences = self.sequences._replace(
                seen_SV=torch.zeros(count, self.vocab, dtype=torch.bool, device=device)
            )
        if "count" in new:
            self.sequences = self.sequences._replace(
                count_SV=torch.zeros(count, self.vocab, dtype=torch.int32, device=device)
            )
        if "listed" in new:
            kinds = (torch.int64, torch.float32, torch.int64)
            self.listed = Listed(*(torch.zeros(count, MOST_LISTED, dtype=kind, device=device) for kind in kinds))
        if "allowed" in new:
            self.allowed_SW = torch.full((count, words(self.vocab)), -1, dtype=torch.int32, device=device)
        self.kept |= new
        return bool(new)

    def admit(
        self,
        handle: int,
        ids: tuple[int, ...],
        params: SamplingParams,
        said: Sequence[int] = (),
        ends: Iterable[int] = (),
    ) -> None:
        """Take over a request's parameters.

        Args:
            ids: of prompt and answer so far.
            said: the answer so far, of one that was put back.
            ends: ids that end the answer.
        """
        device = self.ranks.device
        told = (*params.row(), *params.penalties(), params.seed, kind(params))
        if self.told.get(handle) != told:  # most requests have their forerunner's
            self.told[handle] = told
            self.params_S.value_SP[handle] = to_device(params.row(), torch.float64, device)
            # fill_: to assign a number would be a copy that waits for the step under way.
            self.params_S.seed_S[handle].fill_(params.settled().seed or 0)
            self.params_S.kind_S[handle].fill_(kind(params))
            self.penalty_S3[handle] = to_device(params.penalties(), torch.float64, device).float()
        kept = params.kept
        assert kept <= self.kept, "State.keep was not called"
        seen_SV, count_SV = self.sequences.seen_SV, self.sequences.count_SV
        if "seen" in kept and seen_SV is not None:
            seen_SV[handle] = False
            seen_SV[handle].index_fill_(0, to_device(ids, torch.int64, device), True)
        if "count" in kept and count_SV is not None:
            count_SV[handle] = 0
            ones = torch.ones(len(said), dtype=torch.int32, device=device)
            count_SV[handle].index_add_(0, to_device(said, torch.int64, device), ones)
        if self.listed is not None and ("listed" in kept or handle in self.lists):
            self._list(handle, entries(params, len(ids) - len(said), ends))
        if self.allowed_SW is not None and ("allowed" in kept or handle in self.masked):
            self._allow(handle, params.allowed_token_ids)

    def _list(self, handle: int, found: Sequence[Entry]) -> None:
        """Make these the entries of a sequence."""
        assert self.listed is not None
        (self.lists.add if found else self.lists.discard)(handle)
        kinds = (torch.int64, torch.float64, torch.int64)
        columns = zip(*found, strict=True) if found else ((), (), ())
        for tensor_SK, column, dtype in zip(self.listed, columns, kinds, strict=True):
            tensor_SK[handle].zero_()
            tensor_SK[handle, : len(found)] = to_device(column, dtype, self.ranks.device)

    def _allow(self, handle: int, ids: Sequence[int] | None) -> None:
        """Let a sequence's token be one of these; None: any."""
        assert self.allowed_SW is not None
        if ids is None:
            self.masked.discard(handle)
            self.allowed_SW[handle] = -1
        else:
            self.masked.add(handle)
            self.allowed_SW[handle] = to_device(packed(ids, self.vocab).tolist(), torch.int32, self.ranks.device)

    def mask(self, handles: Sequence[int], word_GW: torch.Tensor) -> None:
        """Allow these sequences what these words on the host, pinned ones, allow; for their next tokens."""
        assert self.allowed_SW is not None
        self.masked.update(handles)
        device = self.ranks.device
        handle_G = to_device(handles, torch.int64, device)
        self.allowed_SW.index_copy_(0, handle_G, word_GW.to(device, non_blocking=True))

    def adjustments(self) -> Adjustments:
        """Of all sequences."""
        _, _, seen_SV, count_SV = self.sequences
        return Adjustments(self.penalty_S3, seen_SV, count_SV, self.listed, self.allowed_SW)

    def sample(
        self,
        logits_BV: torch.Tensor,
        sequence_B: torch.Tensor,
        position_B: torch.Tensor,
        variant: Variant,
        part: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """The next ids [B], at `position_B` of the sequences; a collective.

        They are the same on every rank: those of expert rank 0, or what all ranks find together when each has the
        logits of its `part` of the vocabulary. V, where the logits are not finite, is for the host to see.
        """
        with named("sample"):
            if variant.level == Level.GREEDY and not variant.adjusted:
                greedy = twin("greedy", logits_BV)
                key_SB = greedy.largest(logits_BV, part[0] if part else 0)
                id_B = greedy.join_largest(self.ranks.stack(key_SB.amax(0)) if part else key_SB, self.vocab)
            else:
                assert part is None
                adjustments = self.adjustments() if variant.adjusted else None
                id_B = sample(logits_BV, sequence_B, position_B, self.params_S, adjustments, variant.level)
            if part is None:
                self.ranks.broadcast(id_B)
        return id_B

    def advance(
        self, id_B: torch.Tensor, sequence_B: torch.Tensor, position_B: torch.Tensor, drafted: Drafted | None = None
    ) -> torch.Tensor:
        """The state after these ids, of which it returns those that count: `layers.sequence_state.advance`.

        For one that is no id it has one that the model can take, until the host sees it.
        """
        twins = twin("sequence_state", self.sequences.token_S)
        counted_B: torch.Tensor = twins.advance(id_B, sequence_B, position_B, self.sequences, self.vocab, drafted)
        return counted_B

    def branches(self, count: int) -> list[int]:
        """Handles for so many rows of drafts; `branch` fills them."""
        handles = list(range(self.spare + 1, self.spare + 1 + count))
        assert handles[-1] < self.count, "more rows than branches"
        return handles

    def branch(self, drafts: Sequence[tuple[int, Sequence[int], bool]]) -> None:
        """Let the first `branches` be copies of the sequences' state, as if the tokens had come, row by row.

        They hold until the next call.

        Args:
            drafts: a sequence's handle and its draft, and whether its masks are still to come: then none is copied.
        """
        device = self.ranks.device
        rows = [(handle, draft[:count], late) for handle, draft, late in drafts for count in range(1, len(draft) + 1)]
        handles = self.branches(len(rows))
        from_R, to_R = (to_device(each, torch.int64, device) for each in ([row[0] for row in rows], handles))
        _, _, seen_SV, count_SV = self.sequences
        for each in (*self.params_S, self.penalty_S3, seen_SV, count_SV, *(self.listed or ())):
            if each is not None:
                each.index_copy_(0, to_R, each[from_R])
        masked = [(handle, to) for (handle, _, late), to in zip(rows, handles, strict=True) if not late]
        if self.allowed_SW is not None and masked:
            from_X, to_X = (to_device(each, torch.int64, device) for each in zip(*masked, strict=True))
            self.allowed_SW.index_copy_(0, to_X, self.allowed_SW[from_X])
        if seen_SV is None and count_SV is None:
            return
        said = [(handle, id) for handle, (_, ids, _) in zip(handles, rows, strict=True) for id in ids]
        handle_X, id_X = (to_device(each, torch.int64, device) for each in zip(*said, strict=True))
        if seen_SV is not None:
            seen_SV.index_put_((handle_X, id_X), torch.ones_like(handle_X, dtype=torch.bool))
        if count_SV is not None:
            count_SV.index_put_((handle_X, id_X), torch.ones_like(handle_X, dtype=torch.int32), accumulate=True)

    def tokens(self, given_T: torch.Tensor) -> torch.Tensor:
        """int64 [T]: the given tokens, and where -1 - handle is given, that sequence's last one."""
        token_S = self.sequences.token_S
        found: torch.Tensor = twin("sequence_state", token_S).look_up(given_T, token_S)
        return found

    def last(self, sequence_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The last token of each row's sequence, its position and the position after it: int64 [B] each."""
        token_S, position_S, *_ = self.sequences
        found: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
        found = twin("sequence_state", token_S).take(sequence_B, token_S, position_S)
        return found
