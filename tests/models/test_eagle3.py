"""The EAGLE3 head against what it means: the layer over the whole sequence, written anew in tests/helpers/heads.py.

Letters: T positions · B sequences · X = 3H.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from attention_cases import decode_step
from heads import RandomHead, ReferenceHead, target_config, write_head
from interpret import interpreted
from steps import make_step
from torch import Tensor, nn

from epmoe.cache.cache import Cache, CacheConfig
from epmoe.layers.twin import switched
from epmoe.models.eagle3 import Eagle3
from epmoe.weights.eagle3 import load_head, open_head

CASES = {
    "published": RandomHead(),
    "other names": RandomHead(layer_name="layers.0."),
    "norm before residual": RandomHead(norm_before_residual=True),
    "biases": RandomHead(attention_bias=True),
    "its own embedding": RandomHead(own_embedding=True),
    "one head a group": RandomHead(heads=2, kv_heads=2),
}
DEPTH = 4  # rows that the head feeds itself


@dataclass
class Beside:
    """A loaded head with its cache, and the reference with the same weights in float32."""

    head: Eagle3
    reference: ReferenceHead
    cache: Cache

    @classmethod
    def of(
        cls, path: Path, case: RandomHead, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 1
    ) -> "Beside":
        embedding_VH = torch.randn(case.vocab, case.hidden, generator=torch.Generator().manual_seed(seed)).to(dtype)
        tensors = write_head(path, case, dtype=dtype)
        target = nn.Embedding(case.vocab, case.hidden, _weight=embedding_VH.to(device))
        head = load_head(path, open_head(path, target_config(case)), target, device, dtype)
        wide = {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}
        sizes = CacheConfig((None,), case.kv_heads, case.head_dim, tokens=256, sequences=3, page=4, dtype=dtype)
        cache = Cache(sizes, device)
        cache.layers[0].fill_(torch.nan)  # what is read before it was written shows
        return cls(head, ReferenceHead(case, wide, embedding_VH.float()), cache)

    def spans(self, pieces: list[tuple[int, Tensor, Tensor, int]]) -> Tensor:
        """The head over pieces of sequences: (handle, tokens, features, positions before)."""
        device = self.cache.device
        step = make_step([(handle, token_T.tolist(), cached) for handle, token_T, _, cached in pieces], device=device)
        feature_TH = torch.cat([feature_TH for _, _, feature_TH, _ in pieces])
        return self.head(step.token_T, feature_TH, step.position_T, self.cache.layer(0), self.cache.plan(step)[None])

    def rows(self, places: list[tuple[int, int]], token_B: Tensor, feature_BH: Tensor) -> Tensor:
        """The head at one (handle, position) of each sequence."""
        step = decode_step(self.cache, places)
        plan = self.cache.plan(step)[None]
        return self.head(token_B.to(self.cache.device), feature_BH, step.position_T, self.cache.layer(0), plan)


def random_sequence(case: RandomHead, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """The tokens after positions 0 … T - 1, and the target's residual streams there, [T, 3H]."""
    generator = torch.Generator().manual_seed(seed)
    token_T = torch.randint(case.vocab, (count,), generator=generator)
    return token_T, torch.randn(count, 3 * case.hidden, generator=generator)


def close(found: Tensor, wanted: Tensor) -> None:
    """float32 in another order: 1e-4, some tens of roundings of numbers up to 10."""
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-4, atol=1e-4)


@pytest.fixture(params=list(CASES.values()), ids=list(CASES))
def case(request: pytest.FixtureRequest) -> RandomHead:
    return request.param


@torch.inference_mode()
def test_a_prompt_whole_in_pieces_and_row_by_row(case: RandomHead, tmp_path: Path) -> None:
    """A prompt as one span; another in two, beside the first's next; then rows of both at once."""
    beside = Beside.of(tmp_path, case)
    sequences = [random_sequence(case, count, seed) for seed, count in enumerate((23, 17))]
    feature = [beside.reference.fuse(feature_TX) for _, feature_TX in sequences]
    wanted = [beside.reference.layer(token_T, each) for (token_T, _), each in zip(sequences, feature, strict=True)]
    tokens = [token_T for token_T, _ in sequences]
    for (_, feature_TX), each in zip(sequences, feature, strict=True):
        close(beside.head.fuse(feature_TX), each)
    first, second = (beside.cache.admit(64) for _ in range(2))
    close(beside.spans([(first, tokens[0][:19], feature[0][:19], 0)]), wanted[0][:19])
    close(beside.spans([(second, tokens[1][:5], feature[1][:5], 0)]), wanted[1][:5])
    pieces = [(second, tokens[1][5:13], feature[1][5:13], 5), (first, tokens[0][19:20], feature[0][19:20], 19)]
    found = beside.spans(pieces)
    close(found[:8], wanted[1][5:13])
    close(found[8:], wanted[0][19:20])
    for ahead in range(3):
        places = [(first, 20 + ahead), (second, 13 + ahead)]
        token_B = torch.stack([tokens[0][20 + ahead], tokens[1][13 + ahead]])
        found = beside.rows(places, token_B, torch.stack([feature[0][20 + ahead], feature[1][13 + ahead]]))
        close(found, torch.stack([wanted[0][20 + ahead], wanted[1][13 + ahead]]))


@torch.inference_mode()
def test_fed_by_itself(case: RandomHead, tmp_path: Path) -> None:
    """It proposes, and reads its own result as the next position's feature and its own token, several times; then the
    target has been there, and the same positions are written anew with real features."""
    beside = Beside.of(tmp_path, case)
    token_T, feature_TX = random_sequence(case, 20, 3)
    feature_TH = beside.reference.fuse(feature_TX)
    handle, prompt = beside.cache.admit(40), 15
    hidden_BH = beside.spans([(handle, token_T[:prompt], feature_TH[:prompt], 0)])[-1:]
    own_T, own_TH = token_T[:prompt], feature_TH[:prompt]
    for ahead in range(DEPTH):
        wanted_TH = beside.reference.layer(own_T, own_TH)
        close(hidden_BH, wanted_TH[-1:])
        proposed_B = beside.head.propose(hidden_BH)
        assert proposed_B.dtype == torch.int64
        assert torch.equal(proposed_B, beside.reference.propose(wanted_TH[-1:]))
        own_T, own_TH = torch.cat((own_T, proposed_B)), torch.cat((own_TH, wanted_TH[-1:]))
        hidden_BH = beside.rows([(handle, prompt + ahead)], proposed_B, hidden_BH)
    found_TH = beside.spans([(handle, token_T[prompt:], feature_TH[prompt:], prompt)])
    close(found_TH, beside.reference.layer(token_T, feature_TH)[prompt:])


@torch.inference_mode()
def test_proposals_are_the_targets_ids(tmp_path: Path) -> None:
    """Of equal logits the lower draft id, translated; a row that is not finite proposes id 0."""
    beside = Beside.of(tmp_path, RandomHead())
    head = beside.head
    head.unembedding.weight[7:] = head.unembedding.weight[7]
    hidden_BH = torch.randn(50, head.config.hidden, generator=torch.Generator().manual_seed(5))
    hidden_BH[49, 3] = torch.nan
    logits_BD = beside.reference.logits(hidden_BH)
    proposed_B = head.propose(hidden_BH)
    draft_B = torch.where(logits_BD[:, 7] > logits_BD[:, :7].amax(1), 7, logits_BD[:, :7].argmax(1))
    assert set(draft_B[:49].tolist()) > {7}
    target_D = torch.arange(head.config.draft_vocab) + beside.reference.tensors["d2t"]
    assert torch.equal(proposed_B[:49], target_D[draft_B[:49]]) and proposed_B[49] == 0


@torch.inference_mode()
def test_rows_do_not_reach_into_each_other(tmp_path: Path) -> None:
    """A row's bits are those that it has alone."""
    case = RandomHead()
    beside = Beside.of(tmp_path, case)
    tokens, features = zip(*(random_sequence(case, 12, seed) for seed in (1, 2, 3)), strict=True)
    handles = [beside.cache.admit(20) for _ in tokens]
    feature = [beside.head.fuse(each) for each in features]
    for handle, token_T, each in zip(handles, tokens, feature, strict=True):
        beside.spans([(handle, token_T[:11], each[:11], 0)])
    last = [(handle, 11) for handle in handles]
    together = beside.rows(
        last, torch.stack([each[11] for each in tokens]), torch.stack([each[11] for each in feature])
    )
    for index in range(3):
        alone = beside.rows(last[index : index + 1], tokens[index][11:], feature[index][11:])
        assert torch.equal(alone[0], together[index])


@torch.inference_mode()
def kernels(path: Path) -> None:
    """A prompt, two rows and what they propose, all by Triton's kernels."""
    with switched(interpreted=True):
        beside = Beside.of(path, RandomHead())
        token_T, feature_TX = random_sequence(RandomHead(), 9, 3)
        wanted_TH = beside.reference.layer(token_T, beside.reference.fuse(feature_TX))
        feature_TH, handle = beside.head.fuse(feature_TX), beside.cache.admit(12)
        found = [beside.spans([(handle, token_T[:7], feature_TH[:7], 0)])]
        found += [beside.rows([(handle, at)], token_T[at : at + 1], feature_TH[at : at + 1]) for at in (7, 8)]
        close(torch.cat(found), wanted_TH)
        assert torch.equal(beside.head.propose(torch.cat(found)), beside.reference.propose(wanted_TH))


def test_kernels_in_the_interpreter(tmp_path: Path) -> None:
    interpreted(kernels, tmp_path)


@pytest.mark.gpu
@torch.inference_mode()
def test_kernels_in_bf16(tmp_path: Path) -> None:
    """A prompt, then rows by kernels: as near as bf16 gets to the reference in float32 with the same bf16 weights.

    On a CPU in bf16 the largest difference is 0.03 deviations of the reference's numbers, the mean 0.005: three times
    that.
    """
    case = replace(RandomHead(), hidden=256, intermediate=384, heads=8, head_dim=32, vocab=700, draft_vocab=300)
    beside = Beside.of(tmp_path, case, "cuda", torch.bfloat16)
    token_T, feature_TX = random_sequence(case, 60, 4)
    wanted_TH = beside.reference.layer(token_T, beside.reference.fuse(feature_TX))
    feature_TH = beside.head.fuse(feature_TX.to("cuda", torch.bfloat16))
    handle = beside.cache.admit(80)
    found = [beside.spans([(handle, token_T[:50], feature_TH[:50], 0)])]
    for place in range(50, 60):
        found.append(beside.rows([(handle, place)], token_T[place : place + 1], feature_TH[place : place + 1]))
    error_TH = (torch.cat(found).float().cpu() - wanted_TH).abs() / wanted_TH.std()
    assert error_TH.max() < 0.1 and error_TH.mean() < 0.015, (error_TH.max(), error_TH.mean())
    logits_TD = beside.reference.logits(wanted_TH)
    proposed_T = beside.head.propose(torch.cat(found)).cpu()
    draft_V = torch.full((case.vocab,), -1).scatter(
        0, torch.arange(case.draft_vocab) + beside.reference.tensors["d2t"], torch.arange(case.draft_vocab)
    )
    chosen_T = logits_TD.gather(1, draft_V[proposed_T][:, None])[:, 0]
    assert (chosen_T >= logits_TD.amax(1) - 0.1).all(), "a proposal is nearly the best"


@pytest.mark.gpu
@torch.inference_mode()
def test_a_graph_holds_it(tmp_path: Path) -> None:
    """Two rows and their proposals, captured and replayed with other inputs, are what is computed without a graph."""
    case = replace(RandomHead(), hidden=256, intermediate=384, heads=8, head_dim=32, vocab=700, draft_vocab=300)
    beside = Beside.of(tmp_path, case, "cuda", torch.bfloat16)
    handles = [beside.cache.admit(20) for _ in range(2)]
    sequences = [random_sequence(case, 12, seed) for seed in (1, 2)]
    feature = [beside.head.fuse(each.to("cuda", torch.bfloat16)) for _, each in sequences]
    for handle, (token_T, _), each in zip(handles, sequences, feature, strict=True):
        beside.spans([(handle, token_T[:10], each[:10], 0)])
    step = decode_step(beside.cache, [(handle, 10) for handle in handles])
    plan, cached = beside.cache.plan(step)[None], beside.cache.layer(0)
    token_B, feature_BH = step.token_T.clone(), torch.stack([each[10] for each in feature])

    def both() -> tuple[Tensor, Tensor]:
        hidden_BH = beside.head(token_B, feature_BH, step.position_T, cached, plan)
        return hidden_BH, beside.head.propose(hidden_BH)

    both()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    token_B.copy_(torch.stack([token_T[10] for token_T, _ in sequences]))
    graph.replay()
    replayed = [each.clone() for each in captured]
    for found, wanted in zip(replayed, both(), strict=True):
        assert torch.equal(found, wanted)
