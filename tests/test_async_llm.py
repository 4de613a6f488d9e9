"""AsyncLLM: asyncio callers on real models; every answer is, bit for bit, the one that it is alone; nobody hangs."""

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from safetensors.torch import load_file

from epmoe import AsyncLLM, SamplingParams
from epmoe.engine.call import QueueFull, Stopped
from epmoe.engine.service import Service
from epmoe.errors import UserError
from epmoe.llm import LLM
from epmoe.text.completion import Completion
from epmoe.text.delivery import Piece
from epmoe.weights.synthetic import make_checkpoint

ON_CPU: dict[str, Any] = {"runtime": {"device": "cpu", "dtype": "float32", "max_batch": 4}}
LONG = SamplingParams(max_tokens=300, ignore_eos=True)
ENDLESS = SamplingParams(max_tokens=15_000, ignore_eos=True)


async def whole(llm: AsyncLLM, prompt: Any, params: SamplingParams | None = None, priority: int = 0) -> Completion:
    """The completion, which the pieces add up to."""
    pieces: list[Piece] = []
    async for event in llm.generate(prompt, params, priority=priority):
        if isinstance(event, Completion):
            for each in event.outputs:
                own = [piece for piece in pieces if piece.index == each.index]
                assert "".join(piece.text for piece in own) == each.text
                assert sum((piece.ids for piece in own), ()) == each.ids
                assert sum((piece.logprobs for piece in own), ()) == each.logprobs
            return event
        pieces.append(event)
    raise AssertionError("no completion")


def said(completion: Completion) -> list[Any]:
    return [(each.text, each.messages, each.ids, each.finish_reason, each.logprobs) for each in completion.outputs]


def pages_are_free(llm: AsyncLLM) -> bool:
    return llm.llm.cache.pages.unused


def own(llm: AsyncLLM) -> Service:
    assert isinstance(llm.service, Service)
    return llm.service


PROMPT = "a prompt of some length, which shares its beginning"


async def scores(llm: AsyncLLM, wanted: list[Completion]) -> None:
    many = [
        whole(llm, PROMPT[: 10 + 7 * number], SamplingParams(max_tokens=5, prompt_logprobs=number))
        for number in range(6)
    ]
    found = await asyncio.gather(*many, whole(llm, PROMPT))
    assert [each.prompt_logprobs for each in found] == [each.prompt_logprobs for each in wanted]
    (stopped,) = [await whole(llm, PROMPT, SamplingParams(prompt_logprobs=1, stop=(found[-1].text[:1],)))]
    assert stopped.finish_reason == "stop" and len(stopped.prompt_logprobs) == len(stopped.prompt_ids)


async def becomes(true: Any, within_s: float = 60) -> None:
    until = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < until
        await asyncio.sleep(0.01)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "async", max_position=16_000)
    (path / "chat_template.jinja").write_text("{{ messages[0].content }}{{ tools }}")
    return path


@pytest.fixture(scope="module")
def answers(checkpoint: Path) -> Iterator[LLM]:
    with LLM(checkpoint, **ON_CPU) as made:
        yield made


def test_log_probabilities_of_prompts(checkpoint: Path, answers: LLM) -> None:
    """In steps of few tokens beside each other, with a cache that has their beginnings: as one after the other."""
    wanted = [
        answers.generate(PROMPT[: 10 + 7 * number], SamplingParams(max_tokens=5, prompt_logprobs=number))[0]
        for number in range(6)
    ]
    wanted += answers.generate(PROMPT)
    serve(checkpoint, lambda llm: scores(llm, wanted), serve={"step_tokens": 9})


def serve(checkpoint: Path, body: Any, **keys: Any) -> None:
    async def run() -> None:
        async with AsyncLLM(checkpoint, **{**ON_CPU, **keys}) as llm:
            await body(llm)
            assert pages_are_free(llm) or llm.service.failure is not None

    asyncio.run(asyncio.wait_for(run(), 120))


def test_prompts_of_every_kind(checkpoint: Path, answers: LLM) -> None:
    prompts: list[Any] = [
        "text", [1, 2, 3], [{"role": "user", "content": "b"}], {"messages": [{"role": "user", "content": "c"}], "n": 3},
        {"prompt": "d", "max_tokens": 3},
    ]  # fmt: skip
    params = SamplingParams(max_tokens=8, temperature=1.0, seed=5, logprobs=2)

    async def body(llm: AsyncLLM) -> None:
        found = await asyncio.gather(*(whole(llm, prompt, params) for prompt in prompts))
        assert [said(each) for each in found] == [said(answers.generate([prompt], params)[0]) for prompt in prompts]
        drawn = await whole(llm, "text", SamplingParams(temperature=1.0))
        assert drawn.seed != (await whole(llm, "text", SamplingParams(temperature=1.0))).seed
        for wrong, says in (
            ("", "is empty"),
            ([10**6], "vocab_size"),
            ({"prompt": "x", "seat": 1}, "seat"),
            (3, "no prompt"),
            (["a", "b"], "2 prompts"),
        ):
            with pytest.raises(UserError, match=says):
                await whole(llm, wrong)
        assert said(await whole(llm, "text", params)) == said(found[0])

    serve(checkpoint, body)


def test_a_stop_string_ends_one_on_its_token(checkpoint: Path, answers: LLM) -> None:
    text = answers.generate("text", LONG)[0].text
    stops = [text[place : place + 2] for place in (1, 10, 40)]

    async def body(llm: AsyncLLM) -> None:
        for stop in stops:
            params = SamplingParams(max_tokens=300, ignore_eos=True, stop=(stop,), logprobs=1)
            (alone,) = answers.generate("text", params)
            assert said(await whole(llm, "text", params)) == said(alone) and alone.finish_reason == "stop"

    serve(checkpoint, body)


def test_every_way_of_leaving_ends_the_request(checkpoint: Path) -> None:
    async def leaves_the_loop(llm: AsyncLLM) -> None:
        async for _ in llm.generate("a", ENDLESS):
            break

    async def closes(llm: AsyncLLM) -> None:
        events = llm.generate("a", ENDLESS)
        await anext(events)
        await events.aclose()  # type: ignore[attr-defined]

    async def is_cancelled(llm: AsyncLLM) -> None:
        task = asyncio.create_task(whole(llm, "a", ENDLESS))
        await becomes(lambda: own(llm).released)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def is_too_late(llm: AsyncLLM) -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(whole(llm, "a", ENDLESS), 0.02)

    async def body(llm: AsyncLLM) -> None:
        for way in (leaves_the_loop, closes, is_cancelled, is_too_late):
            begin = llm.llm.engine.scheduler.added
            await way(llm)
            await becomes(lambda: pages_are_free(llm) and not own(llm).released and not own(llm).queue)
            assert llm.llm.engine.scheduler.added <= begin + 1

    serve(checkpoint, body)


def test_callers_on_several_threads(checkpoint: Path, answers: LLM) -> None:
    """Each with an event loop of its own, beside the one that has made it."""
    params = SamplingParams(max_tokens=20)

    async def body(llm: AsyncLLM) -> None:
        def caller(number: int) -> list[Any]:
            return [said(asyncio.run(whole(llm, f"{number} {i}", params))) for i in range(3)]

        found = await asyncio.gather(*(asyncio.to_thread(caller, number) for number in range(5)))
        for number, each in enumerate(found):
            assert each == [said(answers.generate(f"{number} {i}", params)[0]) for i in range(3)]

    serve(checkpoint, body)


def test_a_loop_that_ends_harms_nobody(checkpoint: Path) -> None:
    """Its requests end when they have news for it."""

    async def body(llm: AsyncLLM) -> None:
        def vanishes() -> None:
            loop = asyncio.new_event_loop()
            loop.run_until_complete(anext(llm.generate("a", ENDLESS)))
            loop.close()

        await asyncio.to_thread(vanishes)
        assert len((await whole(llm, "b", SamplingParams(max_tokens=20))).ids) == 20
        await becomes(lambda: pages_are_free(llm))

    serve(checkpoint, body)


def test_a_start_that_fails_is_told_and_holds_nothing(checkpoint: Path) -> None:
    broken = mock.patch("epmoe.engine.engine.Engine.prepare", side_effect=RuntimeError("no such kernel"))
    with broken, pytest.raises(RuntimeError, match="no such kernel"):
        AsyncLLM(checkpoint, **ON_CPU)
    assert [each.name for each in threading.enumerate() if each.name == "epmoe-engine"] == []


def test_a_slow_reader_holds_up_nobody_and_loses_nothing(checkpoint: Path, answers: LLM) -> None:
    async def body(llm: AsyncLLM) -> None:
        events = llm.generate("slow", LONG)
        first = await anext(events)
        others = [await whole(llm, str(number), SamplingParams(max_tokens=20)) for number in range(3)]
        assert len(others) == 3
        await becomes(lambda: not own(llm).released)
        second, last = [each async for each in events]  # all that came meanwhile
        assert isinstance(first, Piece) and isinstance(second, Piece) and isinstance(last, Completion)
        assert first.ids + second.ids == last.ids and said(last) == said(answers.generate("slow", LONG)[0])

    serve(checkpoint, body)


def test_a_full_queue_refuses_one_more(checkpoint: Path) -> None:
    async def body(llm: AsyncLLM) -> None:
        tasks = []
        for count in range(1, 5):
            tasks.append(asyncio.create_task(whole(llm, "a", ENDLESS)))
            await becomes(lambda count=count: len(own(llm).released) == count)
        tasks += [asyncio.create_task(whole(llm, "b", ENDLESS)) for _ in range(2)]
        await becomes(lambda: len(own(llm).queue) == 2)
        with pytest.raises(QueueFull, match="2 requests wait already"):
            await whole(llm, "c")
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        assert len((await whole(llm, "c", SamplingParams(max_tokens=5))).ids) == 5

    serve(checkpoint, body, serve={"queue_requests": 2})


def test_weights_change_between_requests_alone(tmp_path: Path, checkpoint: Path, answers: LLM) -> None:
    make_checkpoint(tmp_path, seed=2, max_position=16_000)
    others, ours = (load_file(path / "model.safetensors") for path in (tmp_path, checkpoint))
    params = SamplingParams(max_tokens=8)

    async def body(llm: AsyncLLM) -> None:
        events = llm.generate("a", ENDLESS)
        await anext(events)
        with pytest.raises(UserError, match="1 requests wait or run"):
            await llm.update_weights(others)
        await events.aclose()  # type: ignore[attr-defined]
        with pytest.raises(UserError, match="the model has no nothing"):
            await llm.update_weights({"nothing": others["model.norm.weight"]})
        update, updates = llm.llm.update_weights, asyncio.Event()
        loop = asyncio.get_running_loop()

        def once_one_waits(tensors: Any) -> None:
            loop.call_soon_threadsafe(updates.set)
            while not own(llm).queue:
                time.sleep(0.001)
            update(tensors)

        with mock.patch.object(llm.llm, "update_weights", once_one_waits):
            task = asyncio.create_task(llm.update_weights(others))
            await updates.wait()
            waited = await whole(llm, "a", params)
            await task
        assert said(waited) == said(await whole(llm, "a", params)) != said(answers.generate("a", params)[0])
        await llm.update_weights(ours)
        assert said(await whole(llm, "a", params)) == said(answers.generate("a", params)[0])

    serve(checkpoint, body)


def test_a_failure_of_the_engine_ends_all_with_one_error(checkpoint: Path) -> None:
    async def body(llm: AsyncLLM) -> None:
        tasks = [asyncio.create_task(whole(llm, str(number), ENDLESS)) for number in range(6)]
        await becomes(lambda: len(own(llm).released) == 4)
        with mock.patch.object(llm.llm.engine, "step", side_effect=RuntimeError("the device is gone")):
            found = await asyncio.gather(*tasks, return_exceptions=True)
        assert {str(each) for each in found} == {
            "the engine has failed (RuntimeError: the device is gone), and all requests with it"
        }
        with pytest.raises(Stopped, match="the device is gone"):
            await whole(llm, "a")
        with pytest.raises(Stopped, match="the device is gone"):
            await llm.update_weights({})

    serve(checkpoint, body)


def test_closing_ends_everything(checkpoint: Path) -> None:
    async def body() -> None:
        async with AsyncLLM(checkpoint, **ON_CPU) as llm:
            tasks = [asyncio.create_task(whole(llm, str(number), ENDLESS)) for number in range(6)]
            await becomes(lambda: len(own(llm).released) == 4)
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert {str(each) for each in found} == {"the LLM was closed before the answer's end"}
        llm.close()  # nothing is left to do
        with pytest.raises(UserError, match="generate was called after close"):
            await whole(llm, "a")
        with pytest.raises(UserError, match="update_weights was called after close"):
            await llm.update_weights({})

    asyncio.run(asyncio.wait_for(body(), 60))


def test_mistakes_of_the_configuration(checkpoint: Path) -> None:
    for keys, says in (
        ({"serve": {"step_tokens": 4}}, r"serve.step_tokens=4 leaves no prompt a place beside runtime.max_batch=4"),
        ({"serve.queue_requests": 0}, "serve.queue_requests=0 is out of range"),
        ({"serve": {"queue": 1}}, "unknown key 'serve.queue'"),
        ({"serve": {"port": 1}}, r"serve\.port means nothing to an AsyncLLM"),
        ({"ranks": 0}, "ranks=0 is not a whole number"),
    ):
        with pytest.raises(UserError, match=says):
            AsyncLLM(checkpoint, **{**ON_CPU, **keys})
    with pytest.raises(UserError, match="serve means nothing to an LLM"):
        LLM(checkpoint, serve={})
