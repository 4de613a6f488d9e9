"""lm-evaluation-harness: its scores over HTTP are those that follow from the ids and log-probabilities of `LLM`."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from clients import environment, run
from served import Server, served

from epmoe import LLM, SamplingParams

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

DEMO = Path(__file__).resolve().parents[2] / "epmoe" / "demo"
CHOICES: list[dict[str, Any]] = [
    {"text": "The captain of the", "choices": [" guard", " ship", " unseemly xylophones", "\n"], "answer": 0},
    {"text": "It was a fine morning, and", "choices": [" the sun shone.", " I", " she said: “Ürgh!”"], "answer": 2},
    {"text": "He sat down ", "choices": ["upon the", "by"], "answer": 1},
    {"text": "", "choices": ["The", "Of all"], "answer": 0},
]
TEXTS = ["The old man looked at the sea.\n\nNobody answered him; the night was dark.", "Yes.", "Ein naïver Tag"]
BEGUN = ["It was a fine morning, and", "The captain of the guard", "In the days of old"]
UNTIL, MOST = [",", "\n\n"], 12


@dataclass(frozen=True)
class Expected:
    """What the harness should find, computed in this process."""

    scored: list[list[tuple[float, bool]]]  # of each of CHOICES: log-likelihood, whether it is the greedy answer
    texts: list[float]  # log-likelihoods of TEXTS
    answers: list[str]  # to BEGUN as plain texts
    chat: list[str]  # to BEGUN as messages


def score(llm: LLM, pairs: list[tuple[list[int], int]]) -> list[tuple[float, bool]]:
    """Of each text's ids: the log-probability of all from a place on, and whether each of them is the likeliest."""
    params = SamplingParams(max_tokens=0, prompt_logprobs=1)
    found = []
    for (_, begin), each in zip(pairs, llm.generate([ids for ids, _ in pairs], params), strict=True):
        told = [one for one in each.prompt_logprobs[begin:] if one is not None]
        found.append((sum(one.chosen for one in told), all(one.chosen == one.top[0][1] for one in told)))
    return found


def continued(llm: LLM, context: str, continuation: str) -> tuple[list[int], int]:
    """Ids of a text, and where its continuation begins, which has the spaces at the context's end."""
    short = context.rstrip()
    first = llm.tokenizer.encode("<|startoftext|>", special=False)
    if not short:
        return first + llm.tokenizer.encode(continuation, special=False), 1
    return llm.tokenizer.encode(context + continuation, special=False), len(llm.tokenizer.encode(short, special=False))


@pytest.fixture(scope="module")
def expected() -> Expected:
    with LLM(runtime="cpu") as llm:
        pairs = [continued(llm, doc["text"], choice) for doc in CHOICES for choice in doc["choices"]]
        found = iter(score(llm, pairs))
        texts = score(llm, [continued(llm, "", text) for text in TEXTS])
        params = SamplingParams(max_tokens=MOST, temperature=0.0, stop=tuple(UNTIL))
        begun = [llm.tokenizer.encode(each, special=False) for each in BEGUN]
        return Expected(
            scored=[[next(found) for _ in doc["choices"]] for doc in CHOICES],
            texts=[value for value, _ in texts],
            answers=[each.text for each in llm.generate(begun, params)],
            chat=[each.text for each in llm.chat([[{"role": "user", "content": each}] for each in BEGUN], params)],
        )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with served(tmp_path_factory.mktemp("server"), forked=True) as one:
        yield one


@pytest.fixture(scope="module")
def python(pytestconfig: pytest.Config) -> Path:
    assert pytestconfig.cache is not None
    # transformers reads a tokenizer from files; without torch
    return environment(pytestconfig.cache.mkdir("clients") / "lm-eval", "lm-eval[api]", "transformers")


def write_task(folder: Path, name: str, docs: list[dict[str, Any]], **more: Any) -> None:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(each) + "\n" for each in docs))
    own = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({**own, "test_split": "test", **more}))


def write_tasks(folder: Path, answers: list[str]) -> None:
    """The tasks choice, text and answer; two of three answers are these, one is another."""
    folder.mkdir()
    write_task(
        folder, "choice", CHOICES, output_type="multiple_choice", doc_to_text="{{text}}", doc_to_choice="{{choices}}",
        doc_to_target="{{answer}}", target_delimiter="", metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
    )  # fmt: skip
    write_task(
        folder, "text", [{"text": each} for each in TEXTS], output_type="loglikelihood_rolling", doc_to_text="",
        doc_to_target="{{text}}", metric_list=[{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    )  # fmt: skip
    targets = [*answers[:2], answers[2] + " not this"]
    write_task(
        folder, "answer", [{"text": each, "target": own} for each, own in zip(BEGUN, targets, strict=True)],
        output_type="generate_until", doc_to_text="{{text}}", doc_to_target="{{target}}",
        generation_kwargs={"until": UNTIL, "max_gen_toks": MOST, "do_sample": False},
        metric_list=[{"metric": "exact_match"}],
    )  # fmt: skip


def evaluated(home: Path, python: Path, server: Server, answers: list[str], *words: str) -> tuple[Any, dict[str, Any]]:
    """The results of lm-eval's command by task, and its samples, in the order of the documents."""
    write_tasks(home / "tasks", answers)
    run(
        home, python, "-m", "lm_eval", "run", "--include_path", "tasks", "--output_path", "out", "--log_samples", *words
    )
    (file,) = (home / "out").rglob("results_*.json")
    samples = {}
    for each in (home / "out").rglob("samples_*.jsonl"):
        lines = sorted(map(json.loads, each.read_text().splitlines()), key=lambda line: line["doc_id"])
        samples[each.name.split("_")[1]] = [line["filtered_resps"] for line in lines]
    return json.loads(file.read_text())["results"], samples


def test_completions(tmp_path: Path, python: Path, server: Server, expected: Expected) -> None:
    """Log-likelihoods to their last bit; prompts are ids, three a request."""
    url = f"http://127.0.0.1:{server.port}/v1/completions"
    # It asks for /tokenizer_info first. Where a server has that, it lets its tokenizer put a token in front of texts,
    # as nowhere else, and takes a token of id 0 for none: so this server has not.
    model = f"model={server.model},base_url={url},num_concurrent=2,max_length=512,tokenizer={DEMO}"
    words = ("--model", "local-completions", "--model_args", model, "--batch_size", "3")
    results, samples = evaluated(
        tmp_path, python, server, expected.answers, *words, "--tasks", "choice", "text", "answer"
    )
    told = [[(float(value), greedy == "True") for value, greedy in doc] for doc in samples["choice"]]
    assert told == expected.scored
    assert any(greedy for doc in told for _, greedy in doc) and not all(greedy for doc in told for _, greedy in doc)
    assert [float(value) for (value,) in samples["text"]] == expected.texts
    assert [text for (text,) in samples["answer"]] == expected.answers

    most = [doc.index(max(doc)) for doc in expected.scored]  # the likeliest
    right = [place == doc["answer"] for place, doc in zip(most, CHOICES, strict=True)]
    assert results["choice"]["acc,none"] == sum(right) / len(CHOICES) and 0 < sum(right) < len(CHOICES)
    assert results["answer"]["exact_match,none"] == pytest.approx(2 / 3)
    # these are sums and powers in an order of the harness's own
    total, size = sum(expected.texts), sum(len(text.encode()) for text in TEXTS)
    words_count = sum(len(re.split(r"\s+", text)) for text in TEXTS)
    assert results["text"]["bits_per_byte,none"] == pytest.approx(-total / size / math.log(2), rel=1e-12)
    assert results["text"]["word_perplexity,none"] == pytest.approx(math.exp(-total / words_count), rel=1e-12)


def test_chat(tmp_path: Path, python: Path, server: Server, expected: Expected) -> None:
    url = f"http://127.0.0.1:{server.port}/v1/chat/completions"
    words = ("--model", "local-chat-completions", "--model_args", f"model={server.model},base_url={url}")
    results, samples = evaluated(
        tmp_path, python, server, expected.chat, *words, "--apply_chat_template", "--tasks", "answer"
    )
    assert [text for (text,) in samples["answer"]] == expected.chat
    assert results["answer"]["exact_match,none"] == pytest.approx(2 / 3)
