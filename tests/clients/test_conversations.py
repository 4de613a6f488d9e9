"""Clients that hold conversations: tools with results, streams, answers of a type; chat, Responses, completions."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from clients import asked, environment, run
from scripted import scripted
from served import Server, served

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

# After a question it calls, after the tool's result it speaks: the template begins that message, and a line in it.
SAID = "It rains in Ulm."
CHAIN = (
    "t", "<|channel|>", "commentary to=functions.weather ", "<|constrain|>", "json", "<|message|>",
    '{"city"', ': "Ul', 'm"}', "<|call|>", "\n", "It rains", " in Ulm.", "<|return|>",
)  # fmt: skip
TEMPLATE = (
    "{%- if tools %}{{- '<|start|>developer<|message|>' + tools[0].function.name + '<|end|>' }}{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|start|>' + message.role + '<|message|>' + (message.get('content') or '') + '<|end|>' }}"
    "{%- endfor %}{{- '<|start|>assistant' }}"
    "{%- if messages[-1].role == 'tool' %}{{- '<|channel|>final<|message|>\\n' }}{%- endif %}"
)
TOWN = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "rain": {"enum": ["much", "little", "none"]}},
    "required": ["name", "rain"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def calling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("calling")
    path = scripted(folder / "checkpoint", CHAIN)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    with served(folder / "run", f"checkpoint={path}", "sampling=greedy", forked=True) as one:
        yield one


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The embedded model, whose answers have no markup."""
    with served(tmp_path_factory.mktemp("plain"), forked=True) as one:
        yield one


@pytest.fixture
def client(pytestconfig: pytest.Config) -> Callable[..., Path]:
    """The Python of a client's environment."""
    assert pytestconfig.cache is not None
    folder = pytestconfig.cache.mkdir("clients")
    return lambda name: environment(folder / name, name)


def url(server: Server) -> str:
    return f"http://127.0.0.1:{server.port}/v1"


def address(*servers: Server) -> list[str]:
    return [word for server in servers for word in (url(server), server.model)]


def is_town(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"name", "rain"}
        and len(value["name"]) <= 8
        and value["rain"] in ("much", "little", "none")
    )


def continuation(server: Server, prompt: str) -> str:
    """Twelve greedy tokens, asked for by OpenAI's client."""
    client = server.client()
    return client.completions.create(model=server.model, prompt=prompt, max_tokens=12, temperature=0).choices[0].text


def test_openai_agents(tmp_path: Path, client: Callable[..., Path], calling: Server, plain: Server) -> None:
    found = asked(tmp_path, client("openai-agents"), "agents.py", *address(calling, plain))
    assert found.keys() == {"responses", "chat"}
    for kind, told in found.items():
        town = told.pop("typed")
        assert is_town(town), (kind, town)
        expected = {"told": ["Ulm", "Ulm"], "said": SAID, "streamed": [SAID, SAID], "requests": 2}
        assert told == expected, kind


def test_langchain_openai(tmp_path: Path, client: Callable[..., Path], calling: Server, plain: Server) -> None:
    found = asked(tmp_path, client("langchain-openai"), "langchain.py", *address(calling, plain))
    at_once, streamed, *batch = found.pop("completions")
    assert at_once == streamed == batch[0] == continuation(plain, "He said")
    assert batch[1:] == [continuation(plain, "In the")]
    assert found.keys() == {"chat", "responses"}
    for kind, told in found.items():
        town = told.pop("typed")
        assert is_town(town), (kind, town)
        call = ["weather", {"city": "Ulm"}]
        said = {"said": SAID, "streamed": SAID, "tokens": 3}
        assert told == {"called": call, "streamed call": call, "forced": call[1], **said}, kind


FUNCTION = """
def weather(city: str) -> str:
    "Where it rains"
    return f"rain in {city}"
"""


def test_llm(tmp_path: Path, client: Callable[..., Path], calling: Server, plain: Server) -> None:
    """Its command: a stream and not, completions, a schema, a tool with its result, and a conversation that goes on."""
    python, prompt = client("llm"), "He said"
    models = [
        {"model_id": name, "model_name": server.model, "api_base": url(server), "api_key_name": "own", **more}
        for name, server, more in (
            ("chat", plain, {"supports_schema": True}),
            ("text", plain, {"completion": True}),
            ("calling", calling, {"supports_tools": True}),
        )
    ]
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps(models))

    def llm(*words: str) -> str:
        return run(tmp_path, python, "-m", "llm", *words, env={"LLM_USER_PATH": str(tmp_path)}).removesuffix("\n")

    llm("keys", "set", "own", "--value", "none")
    short = ("-o", "temperature", "0", "-o", "max_tokens", "12")
    assert llm("-m", "text", prompt, *short) == continuation(plain, prompt)
    assert llm("-m", "text", prompt, *short, "--no-stream") == continuation(plain, prompt)
    asked_at_once = llm("-m", "chat", prompt, *short, "--no-stream")
    assert asked_at_once and asked_at_once == llm("-m", "chat", prompt, *short)
    schema = ("--schema", json.dumps(TOWN), "-o", "temperature", "0", "-o", "max_tokens", "100")
    assert is_town(json.loads(llm("-m", "chat", "A town:", *schema)))
    for more in ((), ("--no-stream",)):
        assert llm("-m", "calling", "--functions", FUNCTION, "Rain?", *more) == SAID
    (told,) = json.loads(llm("logs", "-n", "1", "--json"))
    assert re.search(r"rain in Ulm", json.dumps(told["tool_results"]))
    llm("-m", "chat", prompt, *short)
    assert llm("-c", "And then?", *short)
    first, second = json.loads(llm("logs", "-n", "2", "--json"))
    assert first["conversation_id"] == second["conversation_id"]
    assert second["input_tokens"] > first["input_tokens"] + 12
