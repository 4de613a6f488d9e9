"""Nothing compiles, and nothing is captured, after what was run beforehand; for a GPU that is not here."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import triton
from absent_gpu import absent_gpu, load_model

from epmoe.config.schema import Serve
from epmoe.engine import graphs
from epmoe.engine.config import EngineConfig
from epmoe.engine.drafts import Costs
from epmoe.engine.engine import Engine
from epmoe.engine.request import Request, SamplingParams, Workload
from epmoe.engine.service import Service
from epmoe.layers.twin import switched
from epmoe.ranks.mesh import Ranks
from epmoe.rehearsal import brief, zeroed
from epmoe.weights.synthetic import make_checkpoint

# prefill_chunk, drafts, graphs
COMES = ((100, True, True), (33, False, True), (64, False, False))
SLOW = [(16, False, True), (16, True, True), (100, False, True), (3000, False, True), (3000, True, True)]
# Tokens of prompt and answer: long prompts come beside rows of the others, so that steps have more tokens than a chunk.
ASKED = ((1, 9), (5, 12), (3, 9), (70, 4), (66, 2), (7, 25), (80, 23))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a checkpoint, and of what was compiled for it."""
    return make_checkpoint(tmp_path_factory.mktemp("warm"), layers=2)


# The router has other kernels from 17 and from 65 tokens on; with drafts outputs are more than rows.
@pytest.mark.parametrize(("chunk", "drafts", "batch"), [(16, False, 4), (64, False, 4), (16, True, 4), (16, True, 16)])
def test_steps_of_prompts_and_rows_compile_nothing(
    chunk: int, drafts: bool, batch: int, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [Request((n,) * n, SamplingParams(max_new_tokens=new, ignore_eos=True)) for n, new in ASKED]
    late, costs = list[str](), Costs.of(32, 4) if drafts else None
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda *_: None)
    with absent_gpu(place / "kernels") as gpu, switched(interpreted=True):
        model, cache = load_model(place, monkeypatch)
        ranks = Ranks(0, 1, 0, 1, torch.device("cpu"))
        engine = Engine(model, cache, ranks, EngineConfig(max_batch=batch, prefill_chunk=chunk, drafts=costs))
        with torch.inference_mode(), zeroed():
            engine.preparation._prepare_steps(Workload.of(asked, engine.max_batch), None, 60)
            launched = len(gpu.launched)
            monkeypatch.setattr(triton.knobs.compilation, "listener", lambda **what: late.append(what["src"].name))
            results = engine.generate(asked)
    assert [len(each.ids) for each in results] == [new for _, new in ASKED] and len(gpu.launched) > launched + 100
    assert not late


class NoGraph:
    """A part of a step in the place of a CUDA graph of it."""

    def __init__(self, work: Callable[[], object]) -> None:
        self.replay = work
        with brief():
            work()

    def reset(self) -> None:
        pass


class NoCapture:
    def __init__(self, device: torch.device) -> None: ...

    def new_pool(self) -> None: ...

    def __call__(self, work: Callable[[], object]) -> NoGraph:
        return NoGraph(work)


def random_request(rng: random.Random) -> Request:
    """Greedy or sampled, with log-probabilities, penalties, biases, those of its prompt, or none of these."""
    asked: dict[str, object] = {}
    for share, some in (
        (0.4, {"temperature": 1.0, "top_p": rng.choice([1.0, 0.8]), "top_k": rng.choice([0, 5, 40]), "seed": 7}),
        (0.2, {"logprobs": 2}),
        (0.2, {"repetition_penalty": 1.3}),
        (0.1, {"logit_bias": ((3, 1.0),)}),
        (0.1, {"prompt_logprobs": 1}),
    ):
        asked |= some if rng.random() < share else {}
    length = rng.choice([1, 2, 5, 17, 60, 140, rng.randrange(1, 400)])
    params = SamplingParams(max_new_tokens=rng.randrange(1, 30), ignore_eos=True, **asked)  # type: ignore[arg-type]
    return Request(tuple(rng.choices(range(200), k=length)), params)


@pytest.mark.parametrize(
    ("chunk", "drafts", "captured"), [*COMES, *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW)]
)
def test_whatever_comes_compiles_nothing(
    chunk: int, drafts: bool, captured: bool, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server's requests, of which it knows nothing beforehand."""
    rng, late, loads = random.Random(chunk), list[str](), list[Workload]()
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda *_: None)
    monkeypatch.setattr(graphs, "Capture", NoCapture)
    with absent_gpu(place / "kernels"), switched(interpreted=True):
        model, cache = load_model(place, monkeypatch)
        costs = Costs.of(32, 4) if drafts else None
        config = EngineConfig(max_batch=4, prefill_chunk=chunk, graphs=captured, drafts=costs)
        engine = Engine(model, cache, Ranks(0, 1, 0, 1, torch.device("cpu")), config)
        service = Service(engine, Serve(step_tokens=48 if captured else 384))
        monkeypatch.setattr(engine, "prepare", loads.append)
        service.prepare()
        (load,) = loads
        with torch.inference_mode(), zeroed():
            engine.runner.state.keep(load.kept)
            engine.runner.static.keep_logits()
            engine.preparation._prepare_steps(load, None, 60)
            monkeypatch.setattr(triton.knobs.compilation, "listener", lambda **what: late.append(what["src"].name))
            run, ran = engine.graphs._run, list[graphs.Kind]()

            def noted(kind: graphs.Kind) -> None:
                ran.append(kind)
                run(kind)

            monkeypatch.setattr(engine.graphs, "_run", noted)
            engine.scheduler.bound(service.step_tokens, service.alone_tokens)
            left = 100
            while left or engine.busy:
                while left and rng.random() < 0.3:
                    engine.add(random_request(rng))
                    left -= 1
                engine.step()
    assert not late and (not captured or set(ran) <= engine.graphs.ready)
    bodies = {"prompts", "mixed"} if captured else set()
    assert {kind.part for kind in ran} >= {"rows", "head", *bodies, *(["drafts"] if drafts else [])}
