"""The comparison of bits as users start it: its table, what it can see, and on a GPU what it finds."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from forked import python
from torch.nn import functional

from epmoe.bench.bits import BitsConfig, compare, continued, requests, rest, run, ways
from epmoe.config.compose import parse
from epmoe.engine.request import Result, TokenLogprobs
from epmoe.errors import UserError
from epmoe.kernels import linear as kernels_linear
from epmoe.layers import linear as layers_linear
from epmoe.llm import LLM, join
from epmoe.weights.synthetic import make_checkpoint


def command(*keys: str, ranks: int = 1, timeout: float = 120) -> dict[str, Any]:
    """Its line of JSON."""
    done = python("-m", "epmoe.bench", "bits", *keys, ranks=ranks, timeout=timeout)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    ("ranks", "attention"),
    [
        pytest.param(1, "replicate", marks=pytest.mark.slow),
        (2, "replicate"),
        *(pytest.param(2, each, marks=pytest.mark.slow) for each in ("tensor", "data")),
    ],
)
def test_the_command(ranks: int, attention: str) -> None:
    """And what it finds: every bit is the same in any company."""
    keys = ("runtime=cpu", "size=tiny", "prompts=8", "longest=100", "new=4", "company=12")
    found, wanted = command(*keys, f"mesh.attention={attention}", ranks=ranks), ways(8, 12, attention)
    assert found["ranks"] == ranks and found["model"] == "random-tiny"
    assert {row["name"]: row["bits"] for row in found["rows"]} == {way.name: 8 for way in wanted}
    cached = [row["cached_tokens"] > 0 for row in found["rows"]]
    assert attention == "data" or cached == [way.found or way.abort for way in wanted]


def test_requests_are_greedy_and_sampled_and_of_every_length() -> None:
    asked = requests(parse(["size=tiny", "prompts=9", "longest=20"], BitsConfig), 320)
    assert [request.params.temperature for request in asked] == [0, 1] * 4 + [0]
    assert {len(request.ids) for request in asked} >= {1, 20} and all(request.params.logprobs for request in asked)


def test_one_bit_is_seen() -> None:
    logprobs = TokenLogprobs(-0.5, ((7, -0.5), (8, -1.0)))
    one = Result((7,), "length", 0.0, 0.0, (logprobs,))
    assert compare([one, one], [one, one]) == (2, 2)
    other = replace(one, logprobs=(replace(logprobs, chosen=-0.5000000000000001),))
    assert compare([one, other], [one, one]) == (2, 1)
    assert compare([one, replace(one, ids=(8,))], [one, one]) == (1, 1)


def test_what_is_computed_again() -> None:
    """Half of an answer becomes prompt; the rest is compared."""
    (asked, *_) = requests(parse(["size=tiny", "prompts=2", "longest=20", "new=6"], BitsConfig), 320)
    logprobs = [TokenLogprobs(-0.5, ((id, -0.5),)) for id in range(6)]
    whole = Result(tuple(range(6)), "length", 0.0, 0.0, tuple(logprobs))
    (again,) = continued([asked], [whole], 3)
    assert again.ids == (*asked.ids, 0, 1, 2) and again.params == replace(asked.params, max_new_tokens=3)
    assert rest(whole, 3).ids == (3, 4, 5) and rest(whole, 3).logprobs == tuple(logprobs[3:])


def test_mistakes() -> None:
    with pytest.raises(UserError, match="exclude each other"):
        parse(["size=tiny", "checkpoint=somewhere"], BitsConfig)
    with pytest.raises(UserError, match="prompts"):
        parse(["prompts=1"], BitsConfig)


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize("experts", [32, 128])
def test_bits_follow_no_batch_on_a_gpu(tmp_path: Path, experts: int) -> None:
    """gpt-oss's layer shapes."""
    path = make_checkpoint(tmp_path / "shapes", "20b", layers=2, experts=experts, vocab=20_000, shards=1)
    found = command(f"checkpoint={path}", "prompts=40", "longest=6000", timeout=500)
    assert {row["name"]: row["bits"] for row in found["rows"]} == {way.name: 40 for way in ways(40, 256, "replicate")}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_librarys_own_product_is_seen(tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention's projections by the library as it is, which picks an order by the number of rows: bits follow that."""
    sizes: dict[str, Any] = {"layers": 2, "vocab": 20_000} if device == "cuda" else {"vocab": 200}
    path = make_checkpoint(tmp_path / "shapes", "20b" if device == "cuda" else "tiny", shards=1, **sizes)
    config = parse([f"checkpoint={path}", "prompts=12", "longest=60", "new=8", f"runtime.device={device}"], BitsConfig)
    with join(config) as ranks:
        llm = LLM.opened(config, ranks)
        asked = requests(config, llm.architecture.vocab)
        llm.load()

        def same() -> int:
            together, alone = (
                run(llm, way, asked) for way in ways(12, 12, "replicate") if way.name in ("a batch of 12", "alone")
            )
            return compare(alone, together)[1]

        assert same() == 12
        own: Any = kernels_linear if device == "cuda" else layers_linear
        monkeypatch.setattr(own, "linear", lambda x_TH, layer: functional.linear(x_TH, layer.weight, layer.bias))
        assert same() < 12
