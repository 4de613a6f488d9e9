"""The endpoints, with OpenAI's client and by hand, on a real server: what is served is what `LLM.generate` gives."""

import json
import random
import resource
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import openai
import pytest
from served import Server, served

from epmoe import LLM, SamplingParams
from epmoe.text.completion import Completion

PROMPTS = ["It was a fine morning, and", "The captain of the guard", "In the days of old", "He said"]
KEY = "s3cret-key"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    keys = ("serve.max_body=100000", "serve.max_bodies=150000", f"serve.log={folder / 'log'}")
    with served(folder, *keys, forked=True) as one:
        yield one


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(runtime="cpu") as one:
        yield one


def ids_of(choice: Any) -> tuple[int, ...]:
    return tuple(choice.model_extra["token_ids"])


def same(choice: Any, expected: Completion, index: int = 0) -> None:
    own = expected.outputs[index]
    assert ids_of(choice) == own.ids and choice.text == own.text
    assert choice.finish_reason == {"eos": "stop"}.get(own.finish_reason, own.finish_reason)


WITH_IDS = {"return_token_ids": True}


def test_completions_are_those_of_the_same_process(server: Server, llm: LLM) -> None:
    """Text, ids, and lists of them; sampled with a seed, and n of them."""
    client, ids = server.client(), [list(llm.tokenizer.encode(each, special=True)) for each in PROMPTS]
    greedy = llm.generate(PROMPTS, SamplingParams(max_tokens=12, temperature=0.0))
    for prompt in (PROMPTS, ids):
        found = client.completions.create(model=server.model, prompt=prompt, max_tokens=12, extra_body=WITH_IDS)
        assert [each.index for each in found.choices] == [0, 1, 2, 3]
        for each, expected in zip(found.choices, greedy, strict=True):
            same(each, expected)
        assert found.usage is not None and found.usage.prompt_tokens == sum(map(len, ids))
        assert found.usage.completion_tokens == sum(len(each.ids) for each in greedy)
    one = client.completions.create(model=server.model, prompt=ids[0], extra_body=WITH_IDS)
    assert ids_of(one.choices[0]) == llm.generate(ids[0], SamplingParams(max_tokens=16))[0].ids  # OpenAI's length
    (drawn,) = llm.generate(PROMPTS[1], SamplingParams(max_tokens=9, temperature=1.0, top_p=0.9, seed=7, n=3))
    found = client.completions.create(
        model=server.model, prompt=PROMPTS[1], max_tokens=9, temperature=1, top_p=0.9, seed=7, n=3, extra_body=WITH_IDS
    )
    for index, each in enumerate(found.choices):
        same(each, drawn, index)


def test_many_at_a_time_and_cancelled_ones(server: Server, llm: LLM) -> None:
    """12 requests of random lengths, every third of which is dropped on its way."""
    rng = random.Random(3)
    asked = [
        (rng.choice(PROMPTS), SamplingParams(max_tokens=rng.randrange(1, 40), temperature=1.0, seed=number))
        for number in range(12)
    ]
    expected = llm.generate([prompt for prompt, _ in asked], [params for _, params in asked])

    def ask(number: int) -> None:
        prompt, params = asked[number]
        stream = server.client().completions.create(
            model=server.model, prompt=prompt, max_tokens=params.max_new_tokens, temperature=1, seed=params.seed,
            stream=True, extra_body=WITH_IDS,
        )  # fmt: skip
        found: list[int] = []
        with stream:
            for chunk in stream:
                found += ids_of(chunk.choices[0]) if "token_ids" in (chunk.choices[0].model_extra or {}) else ()
                if number % 3 == 0:
                    return
        assert tuple(found) == expected[number].ids

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(len(asked))))
    server.comes_to_rest()


def test_logprobs_and_echo(server: Server, llm: LLM) -> None:
    params = SamplingParams(max_tokens=6, temperature=0.0, logprobs=3, prompt_logprobs=3)
    (expected,) = llm.generate(PROMPTS[0], params)
    asked: dict[str, Any] = {"model": server.model, "prompt": PROMPTS[0], "max_tokens": 6, "echo": True, "logprobs": 3}
    found = server.client().completions.create(**asked)
    (choice,) = found.choices
    told = choice.logprobs
    assert told is not None and choice.text == PROMPTS[0] + expected.text
    of = [*expected.prompt_logprobs, *expected.logprobs]
    assert told.token_logprobs == [None if each is None else each.chosen for each in of]
    assert told.top_logprobs is not None and told.top_logprobs[0] is None
    assert [sorted(each.values()) for each in told.top_logprobs[1:] if each] == [
        sorted(value for _, value in each.top) for each in of if each is not None
    ]
    assert told.tokens is not None and "".join(told.tokens[1:]) == choice.text  # the first one begins every text
    # loglikelihood: nothing is made
    ids = list(expected.prompt_ids)
    for logprobs in (1, None):
        found = server.client().completions.create(
            model=server.model, prompt=ids, max_tokens=0, echo=True, logprobs=logprobs
        )
        told = found.choices[0].logprobs
        assert found.usage is not None and found.usage.completion_tokens == 0
        assert (told is None) == (logprobs is None) and found.choices[0].finish_reason == "length"
        if told is not None:
            assert told.token_logprobs == [None if each is None else each.chosen for each in expected.prompt_logprobs]
    chunks = [chunk.choices[0] for chunk in server.client().completions.create(**asked, stream=True)]
    assert "".join(each.text for each in chunks) == choice.text
    values = [value for each in chunks if each.logprobs for value in each.logprobs.token_logprobs or ()]
    assert values == [None if each is None else each.chosen for each in of]
    offsets = [value for each in chunks if each.logprobs for value in each.logprobs.text_offset or ()]
    assert choice.logprobs is not None and offsets == choice.logprobs.text_offset


def test_streams_add_up(server: Server, llm: LLM) -> None:
    """To what comes at once; usage in a chunk of its own, and in each."""
    asked: dict[str, Any] = {"model": server.model, "prompt": PROMPTS[:2], "max_tokens": 8, "temperature": 1, "seed": 5}
    at_once = server.client().completions.create(**asked, n=2)
    both = {"include_usage": True, "continuous_usage_stats": True}
    stream: Any = server.client().completions.create(**{**asked, "n": 2, "stream": True, "stream_options": both})
    chunks = list(stream)
    assert all(each.usage is not None for each in chunks) and chunks[-1].choices == []
    assert chunks[-1].usage == at_once.usage
    for choice in at_once.choices:
        own = [each.choices[0] for each in chunks[:-1] if each.choices[0].index == choice.index]
        assert "".join(each.text for each in own) == choice.text
        assert [each.finish_reason for each in own] == [None] * (len(own) - 1) + [choice.finish_reason]


def test_stop_strings_and_ids(server: Server, llm: LLM) -> None:
    (whole,) = llm.generate(PROMPTS[0], SamplingParams(max_tokens=20, temperature=0.0))
    stop = whole.text[20:24]
    client = server.client()
    for stream in (False, True):
        found: Any = client.completions.create(
            model=server.model, prompt=PROMPTS[0], max_tokens=20, stop=["no such text", stop], stream=stream
        )
        choices = [each.choices[0] for each in found] if stream else found.choices
        assert "".join(each.text for each in choices) == whole.text[: whole.text.index(stop)]
        assert choices[-1].finish_reason == "stop"
    found = client.completions.create(
        model=server.model, prompt=PROMPTS[0], max_tokens=20,
        extra_body={"stop_token_ids": [whole.ids[4]], "ignore_eos": True, **WITH_IDS},
    )  # fmt: skip
    assert ids_of(found.choices[0]) == whole.ids[:5] and found.choices[0].finish_reason == "stop"
    server.comes_to_rest()


def test_chat_goes_through_the_template(server: Server, llm: LLM) -> None:
    messages: Any = [
        {"role": "system", "content": "It was"},
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
    ]
    (expected,) = llm.chat(messages, SamplingParams(max_tokens=8, temperature=0.0, logprobs=2))
    asked: dict[str, Any] = {"model": server.model, "messages": messages, "max_completion_tokens": 8}
    found = server.client().chat.completions.create(**asked, logprobs=True, top_logprobs=2, extra_body=WITH_IDS)
    (choice,) = found.choices
    assert choice.message.content == expected.text and ids_of(choice) == expected.ids
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert [each.logprob for each in choice.logprobs.content] == [each.chosen for each in expected.logprobs]
    assert [[one.logprob for one in each.top_logprobs] for each in choice.logprobs.content] == [
        [value for _, value in each.top] for each in expected.logprobs
    ]
    chunks = [each.choices[0] for each in server.client().chat.completions.create(**asked, stream=True)]
    assert chunks[0].delta.role == "assistant" and chunks[-1].finish_reason == "length"
    assert "".join(each.delta.content or "" for each in chunks) == expected.text
    asked["messages"] = [{"role": "user", "content": "a " * 490}]
    del asked["max_completion_tokens"]
    rest = server.client().chat.completions.create(**asked, extra_body={"ignore_eos": True})
    assert rest.usage is not None and rest.usage.total_tokens == 512  # all that there is room for


def test_tokenize_and_what_a_server_says_of_itself(server: Server, llm: LLM) -> None:
    ids = llm.tokenizer.encode(PROMPTS[0], special=True)
    status, found, _ = server.ask("/tokenize", {"prompt": PROMPTS[0]})
    assert (status, found) == (200, {"count": len(ids), "max_model_len": 512, "tokens": ids})
    assert server.ask("/tokenize", {"prompt": PROMPTS[0], "add_special_tokens": False})[1]["tokens"] == ids[1:]
    messages = {"messages": [{"role": "user", "content": PROMPTS[0]}]}
    assert server.ask("/tokenize", messages)[1]["tokens"] == ids
    assert server.ask("/detokenize", {"tokens": ids[1:]})[1] == {"prompt": PROMPTS[0]}
    assert server.ask("/detokenize", {"tokens": [10**9]})[0] == 400
    for path in ("/health", "/ready", "/version"):
        assert server.ask(path)[0] == 200
    (model,) = server.client().models.list().data
    assert model.id == server.model == "epmoe-demo"
    assert server.client().models.retrieve(server.model).id == model.id
    fingerprint = server.ask("/version")[1]["fingerprint"]
    answer = server.client().completions.create(model=server.model, prompt="a", max_tokens=1)
    assert answer.system_fingerprint == fingerprint != ""


LONG = "a " * 600
REFUSED: list[tuple[str, dict[str, Any], int, str]] = [
    ("too long", {"prompt": LONG}, 400, "512 tokens"),
    ("unknown model", {"prompt": "a", "model": "other"}, 404, "no model 'other'"),
    ("out of range", {"prompt": "a", "temperature": -1}, 400, "temperature"),
    ("of a wrong type", {"prompt": "a", "max_tokens": "many"}, 400, "max_tokens"),
    ("not served", {"prompt": "a", "length_penalty": 0.5}, 400, "length_penalty"),
    ("not known", {"prompt": "a", "frobnicate": 1}, 400, "frobnicate"),
    ("no prompt", {}, 400, "prompt"),
    ("an empty prompt", {"prompt": ""}, 400, "empty"),
    ("ids of another model", {"prompt": [10**6]}, 400, "vocab_size"),
    ("nothing asked for", {"prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
    ("the same answer twice", {"prompt": "a", "n": 2, "temperature": 0}, 400, "n=2"),
    ("scores of two", {"prompt": "a", "n": 2, "temperature": 1, "echo": True, "max_tokens": 0}, 400, "n=2 with"),
    (
        "too many scores",
        {"prompt": ["a " * 250] * 170, "echo": True, "logprobs": 100, "max_tokens": 1},
        400,
        "log-probabilities, and a request may have 4000000",
    ),
    ("too many strings", {"prompt": "a", "stop": ["x"] * 65}, 400, "stop has 65 strings"),
    ("too many answers", {"prompt": ["a"] * 600, "n": 2, "temperature": 1}, 400, "queue_requests"),
]


@pytest.mark.parametrize(("body", "status", "says"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_refused_with_openais_object(server: Server, body: dict[str, Any], status: int, says: str) -> None:
    for stream in (False, True):
        found, answer, _ = server.ask("/v1/completions", {**body, "stream": stream})
        assert found == status and says in answer["error"]["message"], answer
        assert set(answer["error"]) == {"message", "type", "param", "code"}


def test_scores_of_a_prompt_come_for_one_answer_in_a_stream(server: Server) -> None:
    """Of several the one that has them may come last."""
    body = {"prompt": "a", "n": 2, "temperature": 1, "echo": True, "logprobs": 1, "max_tokens": 1}
    status, answer, _ = server.ask("/v1/completions", {**body, "stream": True})
    assert status == 400 and "n=2 with a stream of echo with logprobs" in answer["error"]["message"]
    assert server.ask("/v1/completions", body)[0] == 200


def test_the_end_of_a_streamed_answer_comes_after_its_tokens(server: Server) -> None:
    """Though it is there before the prompt's log-probabilities are written."""
    body = {"prompt": "It was a fine morning. " * 50, "ignore_eos": True, "stream": True, "echo": True, "logprobs": 100}
    for length in (2, 3, 4):
        status, said, _ = server.ask("/v1/completions", {**body, "max_tokens": length})
        assert status == 200
        lines = [json.loads(line[6:]) for line in said.split("\n\n") if line.startswith("data: {")]
        *before, last = [choice for line in lines for choice in line["choices"]]
        assert last["finish_reason"] == "length" and not any(choice["finish_reason"] for choice in before)
        assert sum(len(choice["logprobs"]["tokens"]) for choice in before[1:]) == length


def test_a_tool_whose_parameters_are_no_object(server: Server) -> None:
    tool = {"type": "function", "function": {"name": "now", "parameters": [1]}}
    body = {"messages": [{"role": "user", "content": "a"}], "tools": [tool], "tool_choice": "required"}
    status, answer, _ = server.ask("/v1/chat/completions", body)
    assert status == 400 and "parameters" in answer["error"]["message"], answer


def test_too_long_names_both_numbers_as_openai_does(server: Server) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.client().completions.create(model=server.model, prompt=LONG)
    assert caught.value.code == "context_length_exceeded" and "602" in str(caught.value) and "512" in str(caught.value)


def test_no_image_is_fetched(server: Server) -> None:
    part = {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}
    body = {"messages": [{"role": "user", "content": [part]}]}
    status, answer, _ = server.ask("/v1/chat/completions", body)
    assert status == 400 and "image_url" in answer["error"]["message"]


def test_paths_methods_and_bodies(server: Server) -> None:
    body = json.dumps({"prompt": "a", "max_tokens": 1}).encode()
    assert server.ask("/v1/nothing")[0] == 404
    assert server.ask("/v1/completions")[0] == 405
    assert server.ask("/v1/completions/", body, {"Host": "elsewhere"})[0] == 404  # and not sent to that host
    assert server.ask("/v1/completions", body, {"Content-Type": "text/plain"})[0] == 415
    status, answer, headers = server.ask("/v1/completions", b"{" + b" " * 150_000)
    assert status == 413 and "100000" in answer["error"]["message"] and headers["connection"] == "close"
    assert not any(name.startswith("access-control") for name in headers)
    for wrong in (b"", b"[]", b"{", b"null", b'{"prompt": "\\ud800"}', b"\xff", b"[" * 5000, b'{"prompt": NaN}'):
        assert server.ask("/v1/completions", wrong)[0] == 400
    assert server.ask("/v1/completions", body)[0] == 200


def test_the_bodies_of_all_requests_are_bounded_together(server: Server) -> None:
    """One that comes while others have the room is told to come again, and does; small ones go on, nothing is left."""
    large = json.dumps({"prompt": "a", "max_tokens": 1, "user": "x" * 90_000}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(large)}"
    for _ in range(3):  # nothing of those before is left
        with server.raw(head.encode() + b"\r\n\r\n" + large[:-1]) as begun:
            deadline = time.monotonic() + 60
            while (found := server.ask("/v1/completions", large))[0] == 200:  # until that one has come
                assert time.monotonic() < deadline
            status, answer, headers = found
            assert status == 429 and headers["retry-after"] == "1" and answer["error"]["code"] == "rate_limit_exceeded"
            assert "serve.max_bodies=150000" in answer["error"]["message"]
            assert server.ask("/v1/completions", {"prompt": "a", "max_tokens": 1})[0] == 200
            begun.sendall(large[-1:])
            assert begun.recv(100).startswith(b"HTTP/1.1 200")
        deadline = time.monotonic() + 60
        while server.ask("/v1/completions", large)[0] != 200:
            assert time.monotonic() < deadline


WORDS = (
    "prompt", "messages", "max_tokens", "n", "stream", "stop", "logprobs", "seed", "tools", "echo", "temperature",
    "response_format", "structured_outputs", "guided_json", "guided_choice", "tool_choice", "logit_bias", "min_tokens",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**70, 1.5, "", "a", [], [1], ["a"], [[1], "a"], [[]], {}, {"role": "user"},
    [{"role": "user", "content": "a"}], [{"role": 3}], [None], {"type": "x"}, "\u0000", "🙂",
    {"type": "json_object"}, {"json": {}}, "required", {"1": 2},
)  # fmt: skip


def test_any_body_is_answered_or_refused(server: Server) -> None:
    """Random fields with random values: never a 5xx, and the server answers afterwards."""
    rng = random.Random(1)
    for _ in range(150):
        body = {name: rng.choice(VALUES) for name in rng.sample(WORDS, rng.randrange(1, 6))}
        body["max_tokens"] = rng.choice((1, 2, "a", -1))
        path = rng.choice(("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"))
        status, answer, _ = server.ask(path, body)
        assert 200 <= status < 500, (path, body, answer)
    assert server.ask("/v1/completions", {"prompt": "a", "max_tokens": 1})[0] == 200
    server.comes_to_rest()
    assert "Traceback" not in server.stderr


def test_metrics_and_the_log(server: Server) -> None:
    """Both count the same; the log has a line for each request and none of its text."""
    before = server.figure("epmoe_completion_tokens_total")
    secret = "Quetzalcoatl"
    server.ask("/v1/completions", {"prompt": secret, "max_tokens": 5, "ignore_eos": True})
    server.ask("/v1/completions", {"prompt": secret, "max_tokens": -5})
    text = server.ask("/metrics")[1]
    assert server.figure("epmoe_completion_tokens_total") == before + 5
    assert f'vllm:generation_tokens_total{{model_name="{server.model}"}} {before + 5}' in text
    for name in ("epmoe_first_token_seconds_count", "epmoe_between_tokens_seconds_count", "epmoe_prompt_tokens_total"):
        assert server.figure(name) > 0
    assert f'vllm:time_to_first_token_seconds_bucket{{le="0.1",model_name="{server.model}"}}' in text
    log = (server.stderr_path.parent / "log").read_text()
    lines = [json.loads(line) for line in log.splitlines()]
    assert secret not in log and lines[-1]["status"] == 400
    assert lines[-2]["completion_tokens"] == 5 and lines[-2]["finish_reasons"] == ["length"]


def test_a_key_is_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n")
    with served(tmp_path / "run", f"serve.api_key_file={file}", "serve.model=own/name", forked=True) as one:
        assert one.model == "own/name"
        for wrong in ("", "Bearer", "Bearer wrong", f"Bearer {KEY}x", KEY):
            status, answer, headers = one.ask("/v1/models", headers={"Authorization": wrong})
            assert status == 401 and answer["error"]["code"] == "invalid_api_key" and "www-authenticate" in headers
        assert one.ask("/metrics")[0] == 401 and one.ask("/health")[0] == one.ask("/ready")[0] == 200
        assert one.client(KEY).models.list().data[0].id == "own/name"
        with pytest.raises(openai.AuthenticationError):
            one.client("wrong").completions.create(model="own/name", prompt="a")


def test_more_connections_than_a_shell_lets_a_process_open(tmp_path: Path) -> None:
    """As many clients may come as serve.queue_requests says, and a shell's usual bound is 1024 files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    with ExitStack() as stack:
        try:
            one = stack.enter_context(served(tmp_path))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        said = one.stderr
        for _ in range(300):
            stack.enter_context(one.raw(b""))
        assert one.ask("/health")[0] == 200 and one.stderr == said
