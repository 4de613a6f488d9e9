"""Without graphs nothing compiles after what was run beforehand; for a GPU that is not here."""

from pathlib import Path

import pytest
import torch
import triton
from absent_gpu import absent_gpu, load_model

from epmoe.engine.config import EngineConfig
from epmoe.engine.drafts import Costs
from epmoe.engine.engine import Engine
from epmoe.engine.request import Request, SamplingParams, Workload
from epmoe.layers.twin import switched
from epmoe.ranks.mesh import Ranks
from epmoe.rehearsal import zeroed
from epmoe.weights.synthetic import make_checkpoint

# Tokens of prompt and answer: long prompts come beside rows of the others, so that steps have more tokens than a chunk.
ASKED = ((1, 9), (5, 12), (3, 9), (70, 4), (66, 2), (7, 25), (80, 23))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a checkpoint, and of what was compiled for it."""
    return make_checkpoint(tmp_path_factory.mktemp("warm"), layers=2)


# The router has other kernels from 17 and from 65 tokens on; with drafts outputs are more than rows.
@pytest.mark.parametrize(("chunk", "drafts"), [(16, False), (64, False), (16, True)])
def test_steps_of_prompts_and_rows_compile_nothing(
    chunk: int, drafts: bool, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [Request((n,) * n, SamplingParams(max_new_tokens=new, ignore_eos=True)) for n, new in ASKED]
    late, costs = list[str](), Costs.of(32, 4) if drafts else None
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda *_: None)
    with absent_gpu(place / "kernels") as gpu, switched(interpreted=True):
        model, cache = load_model(place, monkeypatch)
        ranks = Ranks(0, 1, 0, 1, torch.device("cpu"))
        engine = Engine(model, cache, ranks, EngineConfig(max_batch=4, prefill_chunk=chunk, drafts=costs))
        with torch.inference_mode(), zeroed():
            engine.preparation._prepare_steps(Workload.of(asked, engine.max_batch), None, 60)
            launched = len(gpu.launched)
            monkeypatch.setattr(triton.knobs.compilation, "listener", lambda **what: late.append(what["src"].name))
            results = engine.generate(asked)
    assert [len(each.ids) for each in results] == [new for _, new in ASKED] and len(gpu.launched) > launched + 100
    assert not late
