"""The state of the sequences around a step: the kernels against torch.

Letters: B rows of a step · S handles of the cache · V vocabulary.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from compile_sm90 import compile_kernel
from interpret import interpreted

from epmoe.batch import SequenceState
from epmoe.engine.adjust import ALWAYS
from epmoe.engine.request import SamplingParams
from epmoe.engine.state import State
from epmoe.kernels import sequence_state as decode_triton
from epmoe.layers import sequence_state
from epmoe.layers.adjust import unpacked
from epmoe.ranks.mesh import Ranks

VOCAB, SEQUENCES = 50, 90


def state(seen: bool) -> State:
    made = State(SimpleNamespace(spare=SEQUENCES), VOCAB, Ranks(0, 1, 0, 1, torch.device("cpu")))  # type: ignore[arg-type]
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


def compare(count: int, seen: bool, device: str) -> None:
    ours, theirs = state(seen), state(seen)
    id_B, sequence_B, position_B = rows(count)
    moved = SequenceState(*(None if each is None else each.to(device) for each in theirs.sequences))  # type: ignore[arg-type]
    taken = decode_triton.take(sequence_B.to(device), moved.token_S, moved.position_S)
    for got_B, wanted_B in zip(taken, ours.last(sequence_B), strict=True):
        assert torch.equal(got_B.cpu(), wanted_B)
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


def test_tokens_that_the_device_knows() -> None:
    """A prompt's are given; of a sequence that decodes its handle is."""
    given_T = torch.tensor([7, -1, -6, 0, -1 - SEQUENCES])
    assert state(seen=False).tokens(given_T).tolist() == [7, 100, 105, 0, 100 + SEQUENCES]


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_compiles_without_spills(arch: int) -> None:
    for kernel in (decode_triton.take_kernel, decode_triton.advance_kernel):
        types = {name: "i32" if name in ("rows", "spare", "vocab") else "*i64" for name in kernel.arg_names}
        types |= {name: kind for name, kind in {"seen_ptr": "*u8", "count_ptr": "*i32"}.items() if name in types}
        signature = {name: kind for name, kind in types.items() if name != "B"}
        assert compile_kernel(kernel, signature, {"B": decode_triton.ROWS}, arch=arch)["spills"] == 0


@pytest.mark.gpu
@pytest.mark.parametrize(("count", "seen"), CASES)
def test_kernels_on_a_gpu(count: int, seen: bool) -> None:
    compare(count, seen, "cuda")


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
