"""LLM, the one place that wires a model: the command's answers, streams, mistakes; alone and on real ranks."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import python
from spawn import commands, run_ranks

from epmoe.engine.request import SamplingParams
from epmoe.errors import UserError
from epmoe.llm import LLM
from epmoe.ranks.mesh import Ranks
from epmoe.weights.synthetic import make_checkpoint

ON_CPU: dict[str, Any] = {"runtime": {"device": "cpu", "dtype": "float32"}}
KEYS: dict[str, Any] = {**ON_CPU, "max_new_tokens": 12}
PROMPTS = ["It was a fine morning, and", "In the days of old", "There"]


@pytest.fixture(scope="module")
def llm() -> Any:
    with LLM(**KEYS) as made:
        yield made


def test_answers_come_in_order_with_text_and_ids(llm: LLM) -> None:
    answers = llm.generate(PROMPTS)
    assert [len(each.ids) for each in answers] == [12] * 3 and all(each.text for each in answers)
    alone = [llm.generate(prompt)[0] for prompt in PROMPTS]
    assert [each.ids for each in alone] == [each.ids for each in answers]
    assert llm.generate(list(answers[0].prompt_ids))[0].ids == answers[0].ids  # token ids go in as they are


def test_each_prompt_may_bring_its_own_parameters(llm: LLM) -> None:
    params = [SamplingParams(max_new_tokens=n, logprobs=n) for n in (1, 2, 3)]
    answers = llm.generate(PROMPTS, params)
    assert [len(each.ids) for each in answers] == [len(each.logprobs) for each in answers] == [1, 2, 3]


WARM = SamplingParams(max_tokens=12, temperature=1.0)


def test_a_seed_is_drawn_for_each_request_and_brings_the_answer_again(llm: LLM) -> None:
    first, second = llm.generate([PROMPTS[0]] * 2, WARM)
    assert first.seed != second.seed and first.ids != second.ids
    (again,) = llm.generate(PROMPTS[0], replace(WARM, seed=second.seed))
    assert (again.seed, again.ids) == (second.seed, second.ids)
    greedy = llm.generate([PROMPTS[0]] * 2)
    assert greedy[0].ids == greedy[1].ids


def test_n_answers_of_a_prompt(llm: LLM) -> None:
    """The first is the one without n; each other one is that of its own seed, alone."""
    params = replace(WARM, seed=3, logprobs=1)
    (alone,), (other, three) = (
        llm.generate(PROMPTS[0], params),
        llm.generate(PROMPTS[:2], [params, replace(params, n=3)]),
    )
    assert len(alone.outputs) == 1 and alone.outputs[0].ids == alone.ids == other.ids
    assert [each.index for each in three.outputs] == [0, 1, 2] and three.text == three.outputs[0].text
    assert len({each.ids for each in three.outputs}) == 3
    for each in three.outputs:
        (single,) = llm.generate(PROMPTS[1], replace(params, seed=each.seed))
        assert single.outputs[0].ids == each.ids and single.logprobs == each.logprobs and single.text == each.text
    with pytest.raises(UserError, match=r"^prompt 2: n=2 answers would be one and the same"):
        llm.generate(PROMPTS[:2], [params, SamplingParams(n=2)])
    with pytest.raises(UserError, match="n=2 answers cannot be streamed as one"):
        llm.stream(PROMPTS[0], replace(params, n=2))
    assert len(llm.generate({"prompt": "a", "n": 2, "max_tokens": 3}, params)[0].outputs) == 2


def test_log_probabilities_of_a_prompt(llm: LLM) -> None:
    """Of n answers the first one has them; a prompt's object and the configuration may ask for them."""
    (alone,) = llm.generate(PROMPTS[0], replace(WARM, prompt_logprobs=2))
    assert len(alone.prompt_logprobs) == len(alone.prompt_ids) > 2 and alone.prompt_logprobs[0] is None
    assert all(each is not None and len(each.top) == 2 and each.chosen < 0 for each in alone.prompt_logprobs[1:])
    (three,) = llm.generate(PROMPTS[0], replace(WARM, prompt_logprobs=2, n=3))
    assert three.prompt_logprobs == alone.prompt_logprobs
    assert [bool(each.prompt_logprobs) for each in three.outputs] == [True, False, False]
    (other,) = llm.generate({"prompt": PROMPTS[0], "prompt_logprobs": 1})
    assert [each and each.top[0] for each in other.prompt_logprobs] == [
        each and each.top[0] for each in alone.prompt_logprobs
    ]
    (nothing,) = llm.generate(PROMPTS[0], SamplingParams(max_tokens=0, prompt_logprobs=2))
    assert (nothing.ids, nothing.text, nothing.finish_reason) == ((), "", "length")
    assert nothing.prompt_logprobs == alone.prompt_logprobs
    assert llm.generate(PROMPTS[0])[0].prompt_logprobs == ()


def test_generation_config_says_what_requests_leave_out(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, max_position=64)
    file = tmp_path / "generation_config.json"
    stored = json.loads(file.read_text())
    file.write_text(json.dumps({**stored, "do_sample": True, "temperature": 2.0, "top_k": 50, "max_new_tokens": 4}))
    warm = SamplingParams(temperature=2.0, top_k=50, max_new_tokens=4, seed=5)
    with LLM(tmp_path, chat="off", **ON_CPU) as llm:
        (wanted,) = llm.generate("a", warm)
        (left_out,) = llm.generate("a", SamplingParams(seed=5))
        assert left_out.ids == wanted.ids and len(wanted.ids) <= 4
        assert llm.generate("a")[0].seed != llm.generate("a")[0].seed
        greedy = SamplingParams(temperature=0.0, top_k=0, max_new_tokens=4)
        assert llm.generate("a", SamplingParams(temperature=0.0))[0].ids == llm.generate("a", greedy)[0].ids
    with LLM(tmp_path, chat="off", sampling={"temperature": 0.0}, max_tokens=4, **ON_CPU) as llm:
        assert llm.generate("a")[0].ids == llm.generate("a", SamplingParams(logprobs=1))[0].ids
    file.write_text(json.dumps({**stored, "top_p": 7}))
    with pytest.raises(UserError, match=r"generation_config\.json: top_p=7 is out of range"):
        LLM(tmp_path, **ON_CPU)


TEMPLATE = "{{ messages[0].content }}{{ effort }}{% for tool in tools or [] %}{{ tool.name }}{% endfor %}"


def test_a_prompt_may_be_an_object_with_what_its_template_reads(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, max_position=64)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    words = {"messages": [{"role": "user", "content": "a"}]}
    prompts: list[Any] = [
        {"prompt": "a", "max_new_tokens": 2},
        {**words, "tools": [{"name": "f"}]},
        "b",
        words["messages"],
    ]
    with LLM(tmp_path, template={"effort": 7}, max_new_tokens=3, runtime=KEYS["runtime"]) as llm:
        answers = llm.generate(prompts)
        assert [llm.tokenizer.decode(each.prompt_ids) for each in answers] == ["a7", "a7f", "b7", "a7"]
        assert [len(each.ids) <= most for each, most in zip(answers, (2, 3, 3, 3), strict=True)] == [True] * 4
        assert llm.generate(prompts[1])[0].prompt_ids == answers[1].prompt_ids
        assert "".join(llm.stream({**words, "effort": 7})) == answers[3].text
        with pytest.raises(UserError, match=r"^prompt 2: unknown key 'effrt'; .*did you mean effort"):
            llm.generate([prompts[0], {**words, "effrt": 7}])
        with pytest.raises(UserError, match=r"^prompt 1: give either prompt or messages"):
            llm.generate({**words, "prompt": "a"})


def test_chat_is_generate_of_the_same_objects(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, max_position=64)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    one, other = [{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]
    tools = [{"name": "f"}, {"name": "g"}]
    with LLM(tmp_path, tools=[{"name": "h"}], template={"effort": 7}, max_new_tokens=3, **ON_CPU) as llm:
        for messages, given, objects in (
            (one, None, [{"messages": one}]),
            (one, tools, [{"messages": one, "tools": tools}]),
            ([one, tuple(other)], tools, [{"messages": each, "tools": tools} for each in (one, other)]),
        ):
            found, wanted = llm.chat(messages, tools=given), llm.generate(objects)
            assert [(each.ids, each.prompt_ids, each.text) for each in found] == [
                (each.ids, each.prompt_ids, each.text) for each in wanted
            ]
        prompts = [llm.tokenizer.decode(each.prompt_ids) for each in (*llm.chat(one), *llm.chat(one, tools=tools))]
        assert prompts == ["a7h", "a7fg"]
        assert len(llm.chat(one, SamplingParams(max_new_tokens=2))[0].ids) <= 2
        with pytest.raises(UserError, match=r"^conversation 1: 'a' .*is no list of messages"):
            llm.chat("a")  # type: ignore[arg-type]
        with pytest.raises(UserError, match=r"^chat: tools are not a list of objects"):
            llm.chat(one, tools="f")  # type: ignore[arg-type]


def test_tools_that_the_template_does_not_read_and_those_that_are_none(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, max_position=64)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with LLM(tmp_path, **ON_CPU) as llm, pytest.raises(UserError, match=r"tools: .* reads no variable 'tools'"):
        llm.chat([{"role": "user", "content": "a"}], tools=[{"name": "f"}])
    with pytest.raises(UserError, match="LLM: tools are not a list of objects"):
        LLM(tmp_path, tools=["f"], **ON_CPU)
    with pytest.raises(UserError, match=r"tools and template\.tools exclude each other"):
        LLM(tmp_path, tools=[{"name": "f"}], template={"tools": []}, **ON_CPU)


def test_a_stream_adds_up_to_the_text(llm: LLM) -> None:
    (answer,) = llm.generate(PROMPTS[0])
    assert "".join(llm.stream(PROMPTS[0])) == answer.text
    stop = answer.text[5:9]
    cut = SamplingParams(max_new_tokens=12, stop=(stop,))
    (whole,) = llm.generate(PROMPTS[0], cut)
    assert "".join(llm.stream(PROMPTS[0], cut)) == whole.text == answer.text.partition(stop)[0]
    assert whole.finish_reason == "stop"
    for piece in llm.stream(PROMPTS[0]):  # left early: the request ends with it
        assert piece
        break
    assert not llm.engine.busy and not llm.cache.pages.held
    assert llm.generate(PROMPTS[0])[0].ids == answer.ids


WRONG: list[tuple[Any, Any, str]] = [
    (["a"], {"max_new_tokens": 2}, r"\{'max_new_tokens': 2\} \(dict\) is no SamplingParams"),
    (["a"], [{"max_new_tokens": 2}], r"\(dict\) is no SamplingParams: give one for all prompts"),
    (["a"], "x", r"'x' \(str\) is no SamplingParams"),
    (5, None, r"5 \(int\) is no prompt: give text"),
    (None, None, r"None \(NoneType\) is no prompt"),
    (b"abc", None, r"\(bytes\) is no prompt"),
    (torch.tensor([1, 2]), None, r"\(Tensor\) is no prompt"),
    (["a", 5], None, r"prompt 2: 5 \(int\) is no prompt"),
    (["a", None], None, r"prompt 2: None"),
    ([1.5], None, r"prompt 1: 1\.5 \(float\) is no prompt"),
    ([[1, 1.5]], None, "prompt 1 is no text, no messages and no list of token ids"),
    ([[True]], None, "prompt 1 is no text"),
    ([[-1]], None, "prompt 1 is no text"),
]


@pytest.mark.parametrize(("prompts", "params", "says"), WRONG, ids=[each[2] for each in WRONG])
def test_what_is_no_prompt_and_what_are_no_parameters(llm: LLM, prompts: Any, params: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        llm.generate(prompts, params)


def test_tuples_are_lists(llm: LLM) -> None:
    (ids,) = {each.ids for each in (*llm.generate((1, 2, 3)), *llm.generate(((1, 2, 3),)), *llm.generate([[1, 2, 3]]))}
    assert len(ids) == 12


def test_after_close_one_line_says_so() -> None:
    made = LLM(**KEYS)
    made.close()
    with pytest.raises(UserError, match="generate was called after close: make another LLM"):
        made.generate("a")


def test_mistakes_are_one_line_and_harm_nobody(llm: LLM) -> None:
    (before,) = llm.generate(PROMPTS[0])
    for prompts, params, message in (
        ("", None, "prompt 1 is empty"),
        (["a", ""], None, "prompt 2 is empty"),
        ([[1, -1]], None, "prompt 1 is no text, no messages and no list of token ids"),
        ([{"content": "a"}], None, "prompt 1: messages must be a list of objects, each with a text `role`"),
        (["a", "b"], [SamplingParams()], "1 SamplingParams for 2 prompts"),
        ("a" * 5000, None, "shorten the prompt"),
    ):
        with pytest.raises(UserError, match=message):
            llm.generate(prompts, params)
    stream = llm.stream(PROMPTS[0])
    next(stream)
    with pytest.raises(UserError, match="within a stream"):
        llm.generate("a")
    stream.close()  # type: ignore[attr-defined]
    assert llm.generate(PROMPTS[0])[0].ids == before.ids


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"expert": "triton"}, "unknown key 'expert'"),
        ({"runtime": {"devise": "cpu"}}, "unknown key 'runtime.devise'"),
        ({"runtime": "tiny"}, "unknown preset"),
        ({"max_new_tokens": "12"}, "max_new_tokens='12' is not a whole number"),
        ({"max_new_tokens": 0}, "out of range"),
        ({"experts": "cublas"}, "experts='cublas' is unknown"),
    ],
)
def test_keys_are_checked(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LLM(**keys)


def answers_of(ranks: Ranks) -> list[Any]:
    """What one rank of several gets; the ranks have met already."""
    from epmoe.config.compose import from_keys

    llm = LLM.opened(from_keys(KEYS), ranks)
    llm.load()
    streamed = "".join(llm.stream(PROMPTS[1]))
    return [*[(each.text, each.ids) for each in llm.generate(PROMPTS)], streamed]


def test_every_rank_gets_the_answers_of_one(llm: LLM) -> None:
    found = run_ranks(answers_of, 2)
    assert found[0] == found[1]
    assert found[0][:3] == [(each.text, each.ids) for each in llm.generate(PROMPTS)]
    assert found[0][3] == found[0][1][0]


def differing(case: str) -> None:
    """A script whose rank 1 makes another call, or none."""
    with LLM(**KEYS) as made:
        if os.environ["RANK"] == "0" or case == "none":
            made.generate(PROMPTS if os.environ["RANK"] == "0" or case != "none" else [])
        elif case == "stream":
            list(made.stream(PROMPTS[0]))
        elif case == "prompt":
            made.generate(PROMPTS[:2])
        elif case == "params":
            made.generate(PROMPTS, SamplingParams(max_new_tokens=3))
        print("came through", file=sys.stdout, flush=True)


@pytest.mark.parametrize(
    "case", ["stream", *(pytest.param(each, marks=pytest.mark.slow) for each in ("prompt", "params")), "end"]
)
def test_a_rank_whose_call_differs_is_named(case: str, tmp_path: Path) -> None:
    with commands(differing, 2, case, folder=tmp_path) as started:
        assert [each.wait(60) for each in started] == [2, 2]
        lines = [line for line in started[0].stderr.splitlines() if "error" in line]
        assert len(lines) == 1 and lines[0].startswith("epmoe: error: rank 1: it comes to ")
        assert "every rank's program must make the same calls" in lines[0]
        assert "came through" not in started[0].stdout


def test_memory_is_given_back() -> None:
    made = LLM(**KEYS)
    made.close()
    assert not hasattr(made, "model") and torch.get_num_threads() == 1


def examples() -> list[Any]:
    """The pieces of Python of the pages that promise to run."""
    root = Path(__file__).resolve().parents[1]
    return [
        pytest.param(block.partition("```")[0], id=f"{page}-{number}")
        for page in ("README.md", "docs/python.md")
        for number, block in enumerate((root / page).read_text(encoding="utf-8").split("```python\n")[1:])
    ]


@pytest.mark.parametrize("text", examples())
def test_examples_run(text: str, tmp_path: Path) -> None:
    """As they are, by themselves, with the embedded model."""
    script = tmp_path / "example.py"
    script.write_text(text, encoding="utf-8")
    done = python(str(script), env={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0 and len(done.stdout) > 50, done.stderr


@pytest.mark.slow  # tests/test_follow.py has one whose ranks it has started
def test_a_script_that_forgets_to_close_ends_well(tmp_path: Path) -> None:
    """Under torchrun: the ranks part at the end of the program, as if it had closed."""
    script = tmp_path / "script.py"
    script.write_text(
        "from epmoe import LLM\nmade = LLM(max_new_tokens=4, runtime='cpu')\n"
        "print(f\"{made.generate('A')[0].ids}\\n\", end='')\n"  # one write, which the other rank's cannot come into
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 2 and lines[0] == lines[1], done.stderr
