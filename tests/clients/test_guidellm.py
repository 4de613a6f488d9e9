"""GuideLLM: a short benchmark of synthetic prompts by each API; every request succeeds and has the tokens asked for."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from clients import environment, run
from served import Server, served

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

DEMO = Path(__file__).resolve().parents[2] / "epmoe" / "demo"
REQUESTS, PROMPT, OUTPUT = 8, 40, 12


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    with served(folder, f"serve.log={folder / 'log'}", forked=True) as one:
        yield one


@pytest.fixture(scope="module")
def python(pytestconfig: pytest.Config) -> Path:
    assert pytestconfig.cache is not None
    return environment(pytestconfig.cache.mkdir("clients") / "guidellm", "guidellm")


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses"])
def test_a_benchmark(tmp_path: Path, python: Path, server: Server, path: str) -> None:
    run(
        tmp_path, python, "-m", "guidellm", "run", "--disable-console-interactive",
        "--backend", f"kind=openai_http,target=http://127.0.0.1:{server.port},request_format={path}",
        "--profile", "kind=concurrent,streams=3",
        "--constraint", f"kind=max_requests,count={REQUESTS}",
        "--tokenizer", f"kind=huggingface_auto,model={DEMO}",
        "--data", f"kind=synthetic_text,prompt_tokens={PROMPT},output_tokens={OUTPUT}",
        "--output", "kind=json,path=report.json",
    )  # fmt: skip
    (found,) = json.loads((tmp_path / "report.json").read_text())["benchmarks"]
    expected = {"successful": REQUESTS, "errored": 0, "incomplete": 0, "total": REQUESTS}
    assert found["metrics"]["request_totals"] == expected
    tokens = found["metrics"]["output_token_count"]["successful"]
    assert (tokens["min"], tokens["max"], tokens["count"]) == (OUTPUT, OUTPUT, REQUESTS)
    for each in found["requests"]["successful"]:
        assert each["output"] and each["info"]["timings"]["token_iterations"] > 1  # it came in pieces
    # the server has seen the same
    log = map(json.loads, (server.stderr_path.parent / "log").read_text().splitlines())
    own = [each for each in log if each["path"] == path]
    assert [each["status"] for each in own] == [200] * REQUESTS
    assert {each["completion_tokens"] for each in own} == {OUTPUT}
    prompts = found["metrics"]["prompt_token_count"]["successful"]["total_sum"]
    assert prompts == sum(each["prompt_tokens"] for each in own) >= PROMPT * REQUESTS
    server.comes_to_rest()
