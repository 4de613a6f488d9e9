"""Without graphs nothing compiles after what was run beforehand; for a GPU that is not here."""

from pathlib import Path

import pytest
import torch
import triton
from absent_gpu import absent_gpu, load_model

from epmoe.engine.config import EngineConfig
from epmoe.engine.engine import Engine
from epmoe.engine.request import Request, SamplingParams, Workload
from epmoe.layers.twin import switched
from epmoe.ranks.mesh import Ranks
from epmoe.rehearsal import zeroed
from epmoe.weights.synthetic import make_checkpoint

# Tokens of prompt and answer: long prompts come beside rows of the others, so that steps have more tokens than a chunk.
ASKED = ((1, 9), (5, 12), (3, 9), (70, 4), (66, 2), (7, 5), (80, 3))


@pytest.mark.parametrize("chunk", [16, 64])  # the router has other kernels from 17 and from 65 tokens on
def test_steps_of_prompts_and_rows_compile_nothing(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = make_checkpoint(tmp_path / "model", layers=2)
    asked = [Request((n,) * n, SamplingParams(max_new_tokens=new, ignore_eos=True)) for n, new in ASKED]
    late: list[str] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda *_: None)
    with absent_gpu(tmp_path / "kernels") as gpu, switched(interpreted=True):
        model, cache = load_model(place, monkeypatch)
        ranks = Ranks(0, 1, 0, 1, torch.device("cpu"))
        engine = Engine(model, cache, ranks, EngineConfig(eos_ids=(), max_batch=4, prefill_chunk=chunk))
        with torch.inference_mode(), zeroed():
            engine.preparation._prepare_steps(Workload.of(asked, engine.max_batch), None, 60)
            launched = len(gpu.launched)
            monkeypatch.setattr(triton.knobs.compilation, "listener", lambda **what: late.append(what["src"].name))
            results = engine.generate(asked)
    assert [len(each.ids) for each in results] == [new for _, new in ASKED] and len(gpu.launched) > launched + 100
    assert not late
