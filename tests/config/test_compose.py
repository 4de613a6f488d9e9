"""Configuration: text is literal, every mistake is one line that names value and remedy, nothing is written to disk."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from epmoe.bench.options import BenchConfig, LoadConfig, StartConfig
from epmoe.config import compose
from epmoe.config.compose import conf_dir, from_keys, parse, presets, to_keys
from epmoe.config.keys import Names, groups_of, keys_of
from epmoe.config.schema import Config, LLMConfig, ModelKeys
from epmoe.errors import UserError

KEYS, GROUPS = keys_of(Config), groups_of(Config)

TEXTS = {
    "words": "Once upon a time",
    "empty": "",
    "comma": "one, two,three,",
    "quotes": """it's "so" 'called' ``code``""",
    "unbalanced": """ ' " ( [ { """,
    "braces": '{"a": [1, 2], "b": {c: d}}',
    "equals": "a=b==c=",
    "dollar": "costs $5 and $HOME",
    "interpolation": "${prompt} ${oc.env:HOME} ${",
    "newlines": "first\nsecond\r\n\n\tindented\n",
    "unicode": "Größe 数学 🙂 \u200d\u00a0é",
    "null": "null",
    "true": "true",
    "number": "1e3",
    "missing": "???",
    "backslashes": r"C:\new\table \\ \" \' \n",
    "list": "[a, b]",
    "range": "range(1,3)",
    "sweep": "choice(a,b)",
    "plus": "+x ~y --help",
    "comment": "# no comment: - yaml",
    "spaces": "  both ends  ",
}
PLAIN_TEXT_KEYS = [each.name for each in KEYS.values() if each.is_text]


def value_of(config: ModelKeys, name: str) -> Any:
    group, _, leaf = name.rpartition(".")
    return getattr(getattr(config, group) if group else config, leaf)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_text_is_literal(text: str) -> None:
    """Hydra would split, unquote, resolve or refuse most of these."""
    chosen = parse([f"prompt={text}", f"system={text}", f"sampling.stop={text}", "sampling=sample"])
    assert chosen.prompt == chosen.system == text
    assert chosen.sampling.stop == ((text,) if text else ())
    assert chosen.sampling.temperature == 1


@pytest.mark.parametrize("key", PLAIN_TEXT_KEYS)
def test_every_text_key_is_literal(key: str) -> None:
    text = "a, ${b}='{c}\"\n"
    needed = {"draft_model": "speculate=auto"}
    assert value_of(parse([f"{key}={text}", *needed.get(key, "").split()]), key) == text


def test_text_keys_are_those_of_the_design() -> None:
    assert {*PLAIN_TEXT_KEYS} == {"checkpoint", "prompt", "prompts", "system", "output", "runtime.profile"} | {
        "hub.kernel",
        "reasoning_effort",
        "draft_model",
        "tools",
        "sampling.grammar",
    }


def test_last_value_wins_and_stop_collects() -> None:
    """scripts put defaults before "$@"."""
    assert parse(["prompt=a", "max_new_tokens=1", "prompt=b", "max_new_tokens=2"]) == parse(
        ["prompt=b", "max_new_tokens=2"]
    )
    assert parse(["sampling.stop=a,b", "sampling.stop=\n"]).sampling.stop == ("a,b", "\n")
    assert parse(["sampling.stop=a", "sampling.stop=", "sampling.stop=b"]).sampling.stop == ("b",)


@pytest.mark.parametrize("value", ["auto", "true", "false"])
def test_graphs_takes_words(value: str) -> None:
    """Two of which are truths in YAML."""
    assert parse([f"runtime.graphs={value}"]).runtime.graphs == value


def test_absent_text_differs_from_empty_text() -> None:
    assert parse([]).prompt is None
    assert parse(["prompt="]).prompt == ""


@pytest.mark.parametrize("group", GROUPS)
def test_presets(group: str) -> None:
    """Each preset fills its whole group with valid values, and its first line says what it is for."""
    for name, about in presets(group).items():
        parse([f"{group}={name}"])
        assert about and "=" not in about


def test_a_key_overrides_its_preset_whatever_the_order() -> None:
    assert parse(["sampling.temperature=0.5", "sampling=sample"]).sampling.temperature == 0.5
    assert parse(["sampling=sample", "sampling.seed=7"]).sampling == dataclasses.replace(
        parse(["sampling=sample"]).sampling, seed=7
    )
    assert parse(["sampling=sample", "sampling.temperature="]).sampling.temperature is None


def test_a_configuration_travels_as_keys() -> None:
    """To another process: through JSON, and it is the same one."""
    for keys in ({}, {"sampling": "focused", "runtime": {"device": "cpu", "timeout_s": 5}, "sampling.stop": ["a", "b"],
                      "template": {"x": [1, {"y": None}]}, "system": "s", "sampling.stop_token_ids": [3]}):  # fmt: skip
        config = from_keys(keys)
        assert from_keys(json.loads(json.dumps(to_keys(config)))) == config


def test_other_spellings_of_a_key() -> None:
    assert parse(["max_tokens=5"]) == parse(["max_new_tokens=5"]) == parse(["max_tokens=5", "max_new_tokens=5"])
    assert from_keys({"max_tokens": 5}).max_new_tokens == 5
    for given in (lambda: parse(["max_new_tokens=5", "max_tokens=6"]),
                  lambda: from_keys({"max_tokens": 6, "max_new_tokens": 5})):  # fmt: skip
        with pytest.raises(UserError, match=r"^max_tokens=6 and max_new_tokens=5 are one key in two spellings"):
            given()
    with pytest.raises(UserError, match=r"^max_new_tokens='many' is not a whole number"):
        parse(["max_tokens=many"])
    with pytest.raises(UserError, match="means nothing to"):
        parse(["max_tokens=5"], BenchConfig)


# command line → what the one line must say
MISTAKES = {
    "typo": (["promt=x"], ["'promt'", "did you mean prompt?", "max_new_tokens", "runtime"]),
    "typo in group": (["sampling.temprature=1"], ["'sampling.temprature'", "did you mean sampling.temperature?"]),
    "key without its group": (["temperature=1"], ["'temperature'", "sampling"]),
    "unknown with plus": (["+frob=1"], ["'+frob'", "known: checkpoint"]),
    "unknown with two pluses": (["++frob=1"], ["'++frob'", "known: checkpoint"]),
    "plus": (["+max_new_tokens=1"], ["'+max_new_tokens'", "write max_new_tokens=value"]),
    "plus on text": (["+prompt=x"], ["'+prompt'", "write prompt=value"]),
    "deletion": (["~prompt"], ["'~prompt'"]),
    "package": (["mesh@runtime=default"], ["'mesh@runtime'", "known"]),
    "hydra's own": (["hydra.run.dir=/x"], ["'hydra.run.dir'", "known"]),
    "no value": (["Hello"], ["'Hello'", "key=value", "--help"]),
    "option": (["--prompt=x"], ["'--prompt'", "--cfg job"]),
    "cfg of what": (["--cfg"], ["--cfg job"]),
    "unknown preset": (["sampling=gredy"], ["sampling='gredy'", "focused", "did you mean greedy?"]),
    "preset as dictionary": (["sampling={temperature:1}"], ["unknown preset", "greedy"]),
    "not whole": (["max_new_tokens=1.5"], ["max_new_tokens='1.5'", "a whole number, at least 1"]),
    "word for number": (["runtime.threads=many"], ["runtime.threads='many'", "a whole number"]),
    "empty for number": (["runtime.max_batch="], ["runtime.max_batch=''", "a whole number"]),
    "null for number": (["sampling.top_p=null"], ["sampling.top_p='null'", "a number above 0 and at most 1"]),
    "truth for number": (["runtime.page=true"], ["runtime.page='true'", "a whole number"]),
    "word for truth": (["runtime.progress=maybe"], ["runtime.progress='maybe'", "true or false"]),
    "list": (["max_new_tokens=[1]"], ["max_new_tokens='[1]'", "a whole number"]),
    "several values": (["experts=reference,triton"], ["'reference,triton'", "several values"]),
    "unreadable": (["quant={mxfp4"], ["quant='{mxfp4'", "known: auto, mxfp4"]),
    "zero tokens": (["max_new_tokens=0"], ["max_new_tokens=0", "at least 1"]),
    "negative": (["sampling.temperature=-1"], ["sampling.temperature=-1", "0 or from 1e-06 to 1000000.0"]),
    "too cold": (["sampling.temperature=1e-9"], ["sampling.temperature=1e-09 is out of range", "0 or from 1e-06 to"]),
    "too hot": (["sampling.temperature=1e7"], ["sampling.temperature=10000000.0 is out of range", "to 1000000.0"]),
    "above one": (["sampling.min_p=1.1"], ["sampling.min_p=1.1", "from 0 to 1"]),
    "nothing to draw from": (["sampling.top_p=0"], ["sampling.top_p=0.0 is out of range", "above 0 and at most 1"]),
    "penalty of nothing": (
        ["sampling.repetition_penalty=0"],
        ["repetition_penalty=0.0", "a number from 1e-06 to 1000000.0"],
    ),
    "penalty beyond float32": (["sampling.repetition_penalty=1e39"], ["repetition_penalty=1e+39", "to 1000000.0"]),
    "too many": (["sampling.logprobs=101"], ["sampling.logprobs=101", "from 0 to 100"]),
    "not a number": (["sampling.temperature=nan"], ["sampling.temperature=nan", "out of range"]),
    "infinite": (["sampling.temperature=inf"], ["sampling.temperature=inf", "out of range"]),
    "seed too large": ([f"sampling.seed={2**63}"], [f"sampling.seed={2**63}", "out of range"]),
    "too many digits": (["max_new_tokens=1" + 400 * "0"], ["max_new_tokens=1000", "out of range"]),
    "number for truth": (["sampling.ignore_eos=2"], ["sampling.ignore_eos='2'", "true or false"]),
    "no time": (["runtime.timeout_s=0"], ["runtime.timeout_s=0", "from 1 to 1000000"]),
    "more time than a clock holds": (["runtime.timeout_s=1e308"], ["runtime.timeout_s=1e+308", "from 1 to 1000000"]),
    "more threads than a machine": ([f"runtime.threads={2**40}"], ["runtime.threads=", "from 1 to 1024"]),
    "a page larger than memory": ([f"runtime.page={2**62}"], ["runtime.page=", "from 1 to 65536"]),
    "unknown format": (["quant=mxfp5"], ["quant='mxfp5'", "auto, mxfp4, bf16", "did you mean mxfp4?"]),
    "unknown experts": (["experts=trition"], ["experts='trition'", "reference", "did you mean triton?"]),
    "unknown router": (["router=x"], ["router='x'", "reference"]),
    "unknown combine": (["combine=allreduce"], ["combine='allreduce'", "slots", "did you mean all_reduce?"]),
    "unknown placement": (["placement=auto"], ["placement='auto'", "contiguous"]),
    "unknown device": (["runtime.device=gpu"], ["runtime.device='gpu'", "auto, cpu, cuda, xpu"]),
    "unknown dtype": (["runtime.dtype=fp16"], ["runtime.dtype='fp16'", "float32"]),
    "unknown graphs": (["runtime.graphs=True"], ["runtime.graphs='True'", "auto, true, false"]),
    "two sources of prompts": (["prompt=x", "prompts=y"], ["prompts='y'", "exclude each other"]),
    "empty prompt and a file": (["prompt=", "prompts=y"], ["exclude each other"]),
    "not UTF-8": (["prompt=caf\udce9"], ["prompt='caf\\udce9'", "UTF-8"]),
    "interpolation": (["runtime.page=${nowhere}"], ["runtime.page='${nowhere}'", "a whole number from 1"]),
    "interpolated name": (["quant=${experts}"], ["quant='${experts}'", "known: auto, mxfp4"]),
    "missing value": (["runtime.page=???"], ["runtime.page='???'", "a whole number from 1"]),
    "newline in a name": (["experts=tri\nton"], ["experts="]),
}


@pytest.mark.parametrize("arguments, says", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_one_line(arguments: list[str], says: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse(arguments)
    message = str(caught.value)
    assert "\n" not in message
    for part in says:
        assert part in message


def test_wrong_value_in_a_file_names_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """conf/ may be edited too."""
    for file in conf_dir().rglob("*.yaml"):
        copy = tmp_path / file.relative_to(conf_dir())
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(file.read_text())
    monkeypatch.setattr(compose, "conf_dir", lambda: tmp_path)
    for content, says in {
        "expert: 0\nfrobnicate: 1\n": "unknown key 'mesh.frobnicate'",
        "expert: [": "default.yaml",
        "expert: all": "mesh.expert='all' is not a whole number",
        "expert: -1": "mesh.expert=-1 is out of range",
    }.items():
        (tmp_path / "mesh" / "default.yaml").write_text(content)
        with pytest.raises(UserError, match=says) as caught:
            parse([])
        assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("schema", [Config, BenchConfig, LoadConfig, StartConfig])
def test_help_names_every_key_preset_and_table_entry(
    schema: type[ModelKeys], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["checkpoint=x", "--help"], schema)
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    for each in keys_of(schema).values():
        if each.name not in schema.ignored:
            line = next(line for line in shown.splitlines() if line.startswith(f"  {each.name}="))
            assert each.about in line and len(line) <= 120
            assert all(name in line for name in (each.allowed.known() if isinstance(each.allowed, Names) else ()))
    for group in groups_of(schema):
        assert all(f"  {group}={name}" in shown for name in presets(group))
    assert [line.split()[0] for line in shown.splitlines() if line.endswith("(default)")] == [
        f"{group}=default" for group in groups_of(schema)]  # fmt: skip


def test_the_help_promises_the_seed_no_more_than_holds() -> None:
    """combine=all_reduce sums in an order that depends on the number of ranks (tests/whole/test_bitwise.py)."""
    assert "same tokens (combine=slots: on any ranks);" in KEYS["sampling.seed"].about


def test_cfg_job_shows_what_would_run(capsys: pytest.CaptureFixture[str]) -> None:
    """What it prints is YAML that reads back as the very configuration, whatever the text holds."""
    everything = "".join(TEXTS.values())
    texts = [f"sampling.stop={text}" for text in TEXTS.values() if text]
    for prompt in ("", "null", everything):
        arguments = ["sampling=sample", f"prompt={prompt}", *texts]
        with pytest.raises(SystemExit):
            parse(["--cfg", "job", *arguments])
        assert from_keys(yaml.safe_load(capsys.readouterr().out), Config) == parse(arguments)


def test_only_rank_0_prints(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    for arguments in (["--help"], ["--cfg", "job"]):
        with pytest.raises(SystemExit):
            parse(arguments)
    assert capsys.readouterr().out == ""


def test_python_values() -> None:
    """By full name, by group or by preset, and the same configuration as the command line's."""
    nested = from_keys({"experts": "reference", "runtime": {"device": "cpu", "page": 4}, "sampling.stop": ["a", "b"]})
    assert type(nested) is LLMConfig
    plain = from_keys(
        {"experts": "reference", "runtime.device": "cpu", "runtime.page": 4, "sampling": {"stop": ("a", "b")}}
    )
    assert nested == plain and nested.sampling.stop == ("a", "b")
    preset = from_keys({"runtime": "cpu", "runtime.timeout_s": 5, "sampling": "sample", "system": None}, Config)
    assert preset == parse(["runtime=cpu", "runtime.timeout_s=5", "sampling=sample"])
    assert type(preset.runtime.timeout_s) is float
    bench = from_keys({"batches": [1, 4], "lengths": (4, 8), "prefill": None, "size": "tiny"}, BenchConfig)
    assert bench == parse(["batches=1,4", "lengths=4,8", "prefill=", "size=tiny"], BenchConfig)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_python_texts_are_literal(text: str) -> None:
    found = from_keys({"prompt": text, "checkpoint": text, "sampling": {"stop": [text] if text else []}}, Config)
    assert found.prompt == found.checkpoint == text and found.sampling.stop == ((text,) if text else ())


# keys → what the one line must say
PYTHON_MISTAKES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "typo": ({"expert": "reference"}, ["unknown key 'expert'", "did you mean experts?"]),
    "typo in a group": ({"runtime": {"devise": "cpu"}}, ["'runtime.devise'", "did you mean runtime.device?"]),
    "preset": ({"runtime": "gpu"}, ["runtime='gpu' is an unknown preset", "small"]),
    "group": ({"runtime": ["cpu"]}, ["runtime=['cpu'] is an unknown preset", "small"]),
    "number as text": ({"runtime.page": "4"}, ["runtime.page='4' is not a whole number from 1 to 65536"]),
    "truth as number": ({"runtime.progress": 1}, ["runtime.progress=1 is not true or false"]),
    "number as truth": ({"runtime": {"page": True}}, ["runtime.page=True is not a whole number"]),
    "number as list": ({"sampling": {"stop": 3}}, ["sampling.stop=3 is not a list of texts"]),
    "nothing": ({"checkpoint": None}, ["checkpoint=None is not text"]),
    "range": ({"sampling.top_p": 0}, ["sampling.top_p=0 is out of range", "above 0 and at most 1"]),
    "too large for a number": ({"sampling.top_k": 2**63}, ["out of range"]),
    "name": ({"experts": "trition"}, ["experts='trition' is unknown", "did you mean triton?"]),
    "of the command": ({"prompt": "x"}, ["prompt means nothing to an LLM", "max_new_tokens"]),
}


@pytest.mark.parametrize("keys, says", PYTHON_MISTAKES.values(), ids=PYTHON_MISTAKES)
def test_python_mistakes_are_one_line(keys: dict[str, Any], says: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        from_keys(keys)
    assert "\n" not in str(caught.value) and all(part in str(caught.value) for part in says)


def test_keys_that_exclude_each_other_in_python() -> None:
    with pytest.raises(UserError, match="exclude each other"):
        from_keys({"prompt": "x", "prompts": "y"}, Config)


def test_a_file_may_set_what_one_command_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """conf/config.yaml is for all commands; a key of no group that only some have means nothing to the others."""
    shutil.copytree(conf_dir(), tmp_path, dirs_exist_ok=True)
    with (tmp_path / "config.yaml").open("a") as file:
        file.write("max_new_tokens: 7\nquant: bf16\n")
    monkeypatch.setattr(compose, "conf_dir", lambda: tmp_path)
    assert (parse([]).max_new_tokens, parse([]).quant, parse([], BenchConfig).quant) == (7, "bf16", "bf16")
    assert parse(["max_new_tokens=3"]).max_new_tokens == 3


@pytest.mark.parametrize("name", ["package.module:Class", "module:Outer.Inner"])
def test_experts_from_outside(name: str) -> None:
    assert parse([f"experts={name}"]).experts == from_keys({"experts": name}).experts == name
    with pytest.raises(UserError, match="is unknown"):
        parse([f"router={name}"])


@pytest.mark.parametrize(
    "name", [":Class", "package.module:", "a:b:c", "a b:c", "package/module:Class", "package.module"]
)
def test_what_is_no_class_from_outside(name: str) -> None:
    with pytest.raises(UserError, match=r"^experts=.* is unknown; known: auto, triton, hub, reference"):
        parse([f"experts={name}"])


def test_import_is_cheap_and_nothing_is_written(tmp_path: Path) -> None:
    """Without torch the import takes a fraction of a second; Hydra's usual outputs/ and logs must not appear."""
    program = "import sys, epmoe.config.compose as c; assert 'torch' not in sys.modules; c.parse(sys.argv[1:])"
    subprocess.run([sys.executable, "-c", program, "prompt=x"], cwd=tmp_path, check=True)
    assert list(tmp_path.iterdir()) == []


def test_mistake_on_two_ranks(tmp_path: Path) -> None:
    """Under torchrun the line is printed once, every rank exits with 2, and no process group was started."""
    program = tmp_path / "command.py"
    program.write_text(
        "import runpy\n"
        "import torch.distributed as dist\n"
        "def forbidden(*a, **k): raise SystemExit('a process group was started')\n"
        "dist.init_process_group = forbidden\n"
        "runpy.run_module('epmoe.generate', run_name='__main__', alter_sys=True)\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(program)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, "experts=tritn"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0
    line = "epmoe: error: experts='tritn' is unknown; known: auto, triton, hub, reference (did you mean triton?)"
    assert done.stderr.splitlines().count(line) == 1 and done.stderr.count("is unknown") == 1
    assert "a process group was started" not in done.stderr and done.stdout == ""
    assert "exitcode  : 2" in done.stderr
