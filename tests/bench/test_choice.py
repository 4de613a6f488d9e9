"""What the choice of tokens adds to a step: measured on the same step, and nothing of it stays."""

from collections.abc import Sequence

import pytest
import torch

from epmoe import LLM
from epmoe.bench import choice
from epmoe.bench.choice import measure_choice
from epmoe.bench.decode import Batch
from epmoe.engine.request import Level, Variant


def test_the_choice_alone_begins_with_the_same_tokens_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was chosen the time before; and the engine is as it was afterwards."""
    with LLM("", runtime={"device": "cpu", "max_batch": 3}) as llm:
        requests = Batch.of(3, 8, llm.architecture.vocab).requests(6, "top_p")
        llm.prepare([*requests, *Batch.of(3, 8, llm.architecture.vocab).requests(6)])
        graphs, state, seen = llm.engine.graphs, llm.engine.runner.state, []
        decode = graphs.decode

        def noted(handles: Sequence[int], variant: Variant) -> torch.Tensor:
            seen.append((variant.level, *(each[handles].tolist() for each in state.sequences[:2])))
            return decode(handles, variant)

        monkeypatch.setattr(choice, "STEPS", 2)
        monkeypatch.setattr(choice, "TURNS", 2)
        before = [each.ids for each in llm.engine.generate(requests)]
        monkeypatch.setattr(graphs, "decode", noted)
        assert measure_choice(llm.engine, llm.ranks, requests).keys() == {"greedy_ms", "above_greedy"}
        assert [level for level, *_ in seen[-8:]] == 2 * [*[Level.GREEDY] * 2, *[Level.SAMPLE] * 2]
        assert all(each[1:] == seen[-1][1:] for each in seen[-8:])
        monkeypatch.setattr(graphs, "decode", decode)
        assert not llm.engine.busy and [each.ids for each in llm.engine.generate(requests)] == before
