"""A replica of several ranks that loses one: AsyncLLM's callers do not notice it, and the other replica goes on."""

import asyncio
import os
import time
from pathlib import Path
from signal import SIGKILL
from typing import Any

import pytest
from safetensors.torch import load_file
from spawn import commands

from epmoe import LLM, AsyncLLM, SamplingParams
from epmoe.engine.engine import Engine
from epmoe.server.replicas import Replicas
from epmoe.text.completion import Completion
from epmoe.weights.hub import DEMO

KEYS: dict[str, Any] = {"runtime": {"device": "cpu", "max_batch": 8, "timeout_s": 20}}
LONG = SamplingParams(max_tokens=36, temperature=1.0, seed=3, ignore_eos=True)
PROMPTS = [f"Number {number}" for number in range(4)]


def serve(folder: str) -> None:
    """Two replicas of two ranks, each with a launcher of its own."""
    rank = int(os.environ["RANK"])
    os.environ["GROUP_RANK"] = str(rank // 2)
    if rank == 3:
        Path(folder, "pid").write_text(str(os.getpid()))
        stop_amid_answers(Path(folder))
    asyncio.run(call(Path(folder)))


def stop_amid_answers(folder: Path) -> None:
    """Some steps after rank 0 has begun to ask, this rank makes no more, and is killed then."""
    step, steps = Engine.step, 0

    def some(engine: Engine) -> Any:
        nonlocal steps
        steps += (folder / "asks").exists()
        if steps > 9:
            time.sleep(1000)
        return step(engine)

    pytest.MonkeyPatch().setattr(Engine, "step", some)


async def call(folder: Path) -> None:
    name = "model.norm.weight"
    new = {name: load_file(next(DEMO.glob("*.safetensors")))[name]}  # the same as before
    async with AsyncLLM(mesh={"replica": 2}, **KEYS) as llm:
        if llm.is_main:
            (folder / "asks").touch()
            tasks = [asyncio.create_task(whole(llm, prompt)) for prompt in PROMPTS]
            await half_an_answer(llm)
            os.kill(int((folder / "pid").read_text()), SIGKILL)
            print(await asyncio.gather(*tasks), flush=True)
        await llm.update_weights(new)
        if llm.is_main:
            print(await whole(llm, PROMPTS[0]), flush=True)


async def half_an_answer(llm: AsyncLLM) -> None:
    """Until the other replica has begun with what it was asked."""
    service = llm.service
    assert isinstance(service, Replicas)
    while not any(replica == 1 and call.ids for call, replica in service.calls.items()):
        await asyncio.sleep(0.001)


async def whole(llm: AsyncLLM, prompt: str) -> tuple[int, ...]:
    async for event in llm.generate(prompt, LONG):
        if isinstance(event, Completion):
            return event.ids
    raise AssertionError("no completion")


def test_callers_do_not_notice_a_lost_rank_of_another_replica(tmp_path: Path) -> None:
    """Its neighbour fails before the loss is judged, and calls are not told of it. The other takes new weights, too."""
    with LLM(**KEYS) as llm:
        expected = [each.ids for each in llm.generate(PROMPTS, LONG)]
    with commands(serve, 4, str(tmp_path), folder=tmp_path) as started:
        assert [each.wait(100) for each in started] == [0, 0, 1, -SIGKILL], [each.stderr for each in started]
    assert started[0].stdout == f"{expected}\n{expected[0]}\n", started[0].stderr
    assert "epmoe: rank 3 ended without a word (killed?); the others go on without ranks 2, 3\n" in started[0].stderr
