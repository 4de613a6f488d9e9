"""The state of the sequences around a step: the kernels against torch.

Letters: B rows of a step · S handles of the cache · V vocabulary.
"""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compile_sm90 import compile_kernel
from interpret import interpreted

from epmoe.batch import Drafted, SequenceState
from epmoe.engine.adjust import ALWAYS
from epmoe.engine.request import ALL_KEPT, SamplingParams
from epmoe.engine.state import State
from epmoe.kernels import sequence_state as decode_triton
from epmoe.layers import sequence_state
from epmoe.layers.adjust import unpacked
from epmoe.ranks.mesh import Ranks

VOCAB, SEQUENCES = 50, 90


def state(seen: bool, branches: int = 0) -> State:
    cache: Any = SimpleNamespace(spare=SEQUENCES)
    made = State(cache, VOCAB, Ranks(0, 1, 0, 1, torch.device("cpu")), branches)
    made.sequences.token_S.copy_(torch.arange(100, 101 + SEQUENCES))
    made.sequences.position_S.copy_(torch.arange(7, 8 + SEQUENCES))
    if seen:
        made.keep(frozenset(("seen", "count")))
    return made


def rows(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, among them V; sequences in no order, the last five spare; positions."""
    random = torch.Generator().manual_seed(count)
    sequence_B = torch.randperm(SEQUENCES, generator=random)[:count]
    sequence_B[-5:] = SEQUENCES
    id_B = torch.randint(VOCAB + 1, (count,), generator=random)
    id_B[0] = VOCAB
    return id_B, sequence_B, torch.randint(1000, (count,), generator=random)


def drafts(count: int, device: str = "cpu") -> tuple[torch.Tensor, Drafted]:
    """Sequences of so many rows, in drafts of up to 16, and spare ones; ids are the wanted ones more often than not."""
    random = torch.Generator().manual_seed(count)
    sequence_B, ahead_B = torch.full((count,), SEQUENCES), torch.zeros(count, dtype=torch.int64)
    wanted_B = torch.full((count,), -1)
    at, handle = 0, 0
    while at + 20 <= count:
        length = int(torch.randint(1, 17, (1,), generator=random))
        sequence_B[at : at + length], ahead_B[at : at + length] = handle, torch.arange(length)
        wanted_B[at : at + length - 1] = torch.randint(3, (length - 1,), generator=random)
        at, handle = at + length, handle + 3
    return sequence_B.to(device), Drafted(ahead_B.to(device), wanted_B.to(device))


def compare_drafts(count: int, seen: bool, device: str) -> None:
    """Some ids are V, some sequences' first ids are wrong, some drafts are right to their end."""
    random = torch.Generator().manual_seed(count)
    ours, theirs = state(seen), state(seen)
    sequence_B, drafted = drafts(count)
    right_B = torch.rand(count, generator=random) < 0.85
    id_B = torch.where(
        right_B & (drafted.wanted_O >= 0), drafted.wanted_O, torch.randint(VOCAB + 1, (count,), generator=random)
    )
    position_B = torch.randint(1000, (count,), generator=random)
    counted_B = sequence_state.advance(id_B, sequence_B, position_B, ours.sequences, VOCAB, drafted)
    id_B, sequence_B, position_B = id_B.to(device), sequence_B.to(device), position_B.to(device)
    moved = SequenceState(*(None if each is None else each.to(device) for each in theirs.sequences))  # type: ignore[arg-type]
    drafted = Drafted(*(each.to(device) for each in drafted))
    got_B = decode_triton.advance(id_B, sequence_B, position_B, moved, VOCAB, drafted)
    assert torch.equal(got_B.cpu(), counted_B) and (counted_B < 0).any() == (count > 30)
    for got, wanted in zip(moved, ours.sequences, strict=True):
        assert got is None or wanted is None or torch.equal(got[:SEQUENCES].cpu(), wanted[:SEQUENCES])
    assert moved.token_S[SEQUENCES] == moved.position_S[SEQUENCES] == 0


def compare(count: int, seen: bool, device: str) -> None:
    ours, theirs = state(seen), state(seen)
    id_B, sequence_B, position_B = rows(count)
    moved = SequenceState(*(None if each is None else each.to(device) for each in theirs.sequences))  # type: ignore[arg-type]
    taken = decode_triton.take(sequence_B.to(device), moved.token_S, moved.position_S)
    for got_B, wanted_B in zip(taken, ours.last(sequence_B), strict=True):
        assert torch.equal(got_B.cpu(), wanted_B)
    given_T = torch.where(torch.arange(count) % 3 > 0, id_B, -1 - sequence_B)
    looked_up_T = decode_triton.look_up(given_T.to(device), moved.token_S)
    assert torch.equal(looked_up_T.cpu(), ours.tokens(given_T))
    sequence_state.advance(id_B, sequence_B, position_B, ours.sequences, VOCAB)
    id_B, sequence_B, position_B = id_B.to(device), sequence_B.to(device), position_B.to(device)
    decode_triton.advance(id_B, sequence_B, position_B, moved, VOCAB)
    for got, wanted in zip(moved, ours.sequences, strict=True):
        assert (got is None) == (wanted is None)
        assert got is None or wanted is None or torch.equal(got.cpu(), wanted)


CASES = [(1, False), (5, True), (64, True), (65, False)]


@pytest.mark.parametrize(("count", "seen"), CASES)
def test_kernels_in_the_interpreter(count: int, seen: bool) -> None:
    interpreted(compare, count, seen, "cpu")
    interpreted(compare_drafts, count, seen, "cpu")


def test_the_state_after_a_token() -> None:
    made = state(seen=True)
    id_B, sequence_B = torch.tensor([3, VOCAB, 9, 4]), torch.tensor([5, 0, SEQUENCES, SEQUENCES])
    sequence_state.advance(id_B, sequence_B, torch.tensor([11, 1, 1, 2]), made.sequences, VOCAB)
    token_S, position_S, seen_SV, count_SV = made.sequences
    assert token_S[[5, 0, SEQUENCES, 1]].tolist() == [3, VOCAB - 1, 0, 101]
    assert position_S[[5, 0, SEQUENCES, 1]].tolist() == [11, 1, 0, 8]
    assert seen_SV is not None and count_SV is not None
    assert count_SV.nonzero().tolist() == [[0, VOCAB - 1], [5, 3]]
    sequence_state.advance(id_B[:1], sequence_B[:1], torch.tensor([12]), made.sequences, VOCAB)
    assert count_SV.sum() == 3 and count_SV[5, 3] == 2
    assert seen_SV.nonzero().tolist() == [[0, VOCAB - 1], [5, 3], [SEQUENCES, 4], [SEQUENCES, 9]]


def test_what_counts_of_drafts() -> None:
    """Right to the end, right at first, wrong at once, one without a draft, spare rows."""
    made = state(seen=True)
    sequence_B = torch.tensor([4, 4, 4, 6, 6, 6, 2, 2, 8, SEQUENCES])
    drafted = Drafted(torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 0, 0]), torch.tensor([7, 7, -1, 5, 9, -1, 3, -1, -1, -1]))
    id_B = torch.tensor([7, 7, 7, 5, 8, 9, VOCAB, 3, 1, 0])
    position_B = torch.arange(20, 30)
    counted_B = sequence_state.advance(id_B, sequence_B, position_B, made.sequences, VOCAB, drafted)
    assert counted_B.tolist() == [7, 7, 7, 5, 8, -1, VOCAB, -1, 1, 0]
    token_S, position_S, seen_SV, count_SV = made.sequences
    assert token_S[[4, 6, 2, 8, SEQUENCES]].tolist() == [7, 8, VOCAB - 1, 1, 0]
    assert position_S[[4, 6, 2, 8, SEQUENCES]].tolist() == [22, 24, 26, 28, 0]
    assert seen_SV is not None and count_SV is not None and count_SV[4, 7] == 3
    assert seen_SV[:SEQUENCES].nonzero().tolist() == [[2, VOCAB - 1], [4, 7], [6, 5], [6, 8], [8, 1]]
    assert count_SV.nonzero().tolist() == [[2, VOCAB - 1], [4, 7], [6, 5], [6, 8], [8, 1]]


def test_branches_know_the_tokens_before_them() -> None:
    """A copy of all that adjusts a sequence's logits, at a handle of its own; the sequence's stays as it is."""
    made = state(seen=True, branches=5)
    made.keep(ALL_KEPT)
    params = SamplingParams(
        temperature=0.5, seed=11, frequency_penalty=1.0, logit_bias=((3, 1.5),), allowed_token_ids=(1, 2, 3, 9)
    ).settled()
    made.admit(6, (1, 2), params, said=(2,))
    before = made.adjustments()[torch.tensor([6])]
    handles = made.branches(3)
    made.branch([(6, [9, 9], False), (0, [4], False)])
    assert handles == [SEQUENCES + 1, SEQUENCES + 2, SEQUENCES + 3]
    assert made.params_S.value_SP[handles[1]].tolist() == list(params.row()) and made.params_S.seed_S[handles[1]] == 11
    found = made.adjustments()[torch.tensor([6, *handles])]
    assert found.count_SV is not None and found.seen_SV is not None and found.listed and found.allowed_SW is not None
    assert [found.count_SV[row, 9].item() for row in range(4)] == [0, 1, 2, 0]
    assert [found.count_SV[row, 2].item() for row in range(4)] == [1, 1, 1, 0]
    assert found.seen_SV[1].nonzero()[:, 0].tolist() == [9] and found.seen_SV[3].nonzero()[:, 0].tolist() == [4]
    assert torch.equal(found.allowed_SW[0], found.allowed_SW[2]) and not torch.equal(
        found.allowed_SW[0], found.allowed_SW[3]
    )
    assert found.listed.value_SK[2, 0] == 1.5 and found.penalty_S3[2].tolist() == [1.0, 1.0, 0.0]
    after = made.adjustments()[torch.tensor([6])]
    assert before.count_SV is not None and after.count_SV is not None and torch.equal(before.count_SV, after.count_SV)


def test_a_mask_that_is_still_to_come_is_not_copied() -> None:
    made = state(seen=False, branches=5)
    made.keep(ALL_KEPT)
    made.admit(6, (1, 2), SamplingParams(allowed_token_ids=(1, 2, 3, 9)).settled())
    made.branch([(6, [9], True), (6, [9], False)])
    assert made.allowed_SW is not None
    late_W, copied_W = made.allowed_SW[made.branches(2)]
    assert torch.equal(copied_W, made.allowed_SW[6]) and not torch.equal(late_W, copied_W)


def test_tokens_that_the_device_knows() -> None:
    """A prompt's are given; of a sequence that decodes its handle is."""
    given_T = torch.tensor([7, -1, -6, 0, -1 - SEQUENCES])
    assert state(seen=False).tokens(given_T).tolist() == [7, 100, 105, 0, 100 + SEQUENCES]


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_compiles_without_spills(arch: int) -> None:
    drafted = dict.fromkeys(("ahead_ptr", "wanted_ptr", "found_ptr"))
    cases = [
        (decode_triton.take_kernel, {}),
        (decode_triton.look_up_kernel, {}),
        (decode_triton.advance_kernel, {}),
        (decode_triton.advance_kernel, drafted),
    ]
    for kernel, missing in cases:
        types = {name: "i32" if name in ("rows", "tokens", "spare", "vocab") else "*i64" for name in kernel.arg_names}
        types |= {name: kind for name, kind in {"seen_ptr": "*u8", "count_ptr": "*i32"}.items() if name in types}
        constants = {"B": decode_triton.ROWS, **missing}
        signature = {name: kind for name, kind in types.items() if name not in constants}
        assert compile_kernel(kernel, signature, constants, arch=arch)["spills"] == 0


@pytest.mark.gpu
@pytest.mark.parametrize(("count", "seen"), CASES)
def test_kernels_on_a_gpu(count: int, seen: bool) -> None:
    compare(count, seen, "cuda")
    compare_drafts(count, seen, "cuda")


def test_parameters_are_told_when_they_change() -> None:
    """A handle's next request may have others, or the same."""
    made = state(seen=False)
    kinds = [SamplingParams(temperature=1.0, seed=3), SamplingParams(temperature=1.0, seed=3), SamplingParams(seed=4)]
    for params in (*kinds, kinds[0]):
        made.admit(7, (1, 2), params.settled())
        assert made.params_S.value_SP[7].tolist() == list(params.row())
        assert int(made.params_S.seed_S[7]) == params.seed


def test_what_a_sequence_asks_for_is_kept_until_its_handle_is_anothers() -> None:
    """Biases, early ends, allowed ids and counts; after a put-back the answer so far is counted again."""
    made = state(seen=True)
    made.keep(frozenset(("listed", "allowed")))
    asked = SamplingParams(
        logit_bias=((4, 2.5),), min_tokens=3, allowed_token_ids=(1, 33), frequency_penalty=1.0, repetition_penalty=1.5
    ).settled()
    made.admit(7, (9, 8, 6, 6), asked, said=(6, 6), ends=(2,))
    found = made.adjustments()[torch.tensor([7, 3])]
    assert found.listed is not None and found.allowed_SW is not None and found.count_SV is not None
    assert [each[0, :3].tolist() for each in found.listed] == [[4, 2, 0], [2.5, -math.inf, 0.0], [ALWAYS, 5, 0]]
    assert found.count_SV.nonzero().tolist() == [[0, 6]] and found.count_SV[0, 6] == 2
    assert unpacked(found.allowed_SW, VOCAB)[0].nonzero()[:, 0].tolist() == [1, 33]
    assert unpacked(found.allowed_SW, VOCAB)[1].all() and found.seen_SV is not None
    assert found.seen_SV.nonzero().tolist() == [[0, 6], [0, 8], [0, 9]]
    assert found.penalty_S3.tolist() == [[1.5, 1.0, 0.0], [1.0, 0.0, 0.0]]
    assert made.params_S.kind_S.nonzero().tolist() == [[7]] and made.params_S.kind_S[7] == 0b1111
    made.mask([7, 3], torch.tensor([[5, 0], [0, 1]], dtype=torch.int32))
    masked = made.adjustments()[torch.tensor([3, 7])].allowed_SW
    assert masked is not None and masked.tolist() == [[0, 1], [5, 0]]
    for handle in (7, 3):
        made.admit(handle, (9,), SamplingParams().settled())
    bare = made.adjustments()[torch.tensor([7, 3])]
    assert bare.listed is not None and bare.allowed_SW is not None
    assert not made.params_S.kind_S.any()
    assert not any(each[0].any() for each in bare.listed) and (bare.allowed_SW == -1).all()
