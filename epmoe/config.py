"""The configuration: types, ranges and meaning of every key (this file) and their values (conf/, composed by Hydra).

    parse(["prompt=Once upon", "sampling=sample", "sampling.seed=3"]) -> Config

Text keys (`prompt` and the like) are taken off the command line before Hydra sees it, so that no character in them
means anything. Every mistake is found here, before a process group starts, and is one line.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from epmoe.errors import UserError


def key(
    about: str,
    *,
    low: float | None = None,
    high: float | None = None,
    names: Sequence[str] = (),
    table: str = "",
    text: bool = False,
    or_zero: bool = False,
) -> Any:
    """A key of the schema. It has no default: values stand in conf/ alone.

    `low` and `high` bound a number; `or_zero` also takes 0 below `low`.
    `names` and the keys of `table` ("module:ATTRIBUTE", imported when needed) are the values it may take; `text` keys
    are taken literally from the command line.
    """
    bounds = {"low": low, "high": high, "or_zero": or_zero}
    return field(metadata={"about": about, "names": names, "table": table, "text": text, **bounds})


# OmegaConf fills the dataclasses field by field, so none of them can be frozen.
@dataclass
class Mesh:
    """The device mesh."""

    expert: int = key("ranks that share the experts of a layer; 0: all ranks", low=0)


@dataclass
class Sampling:
    """How tokens are chosen; a line of a JSON-lines `prompts` file may set these keys for itself."""

    temperature: float = key("0: the likeliest token; above: flatter the higher", low=1e-6, or_zero=True)
    top_k: int = key("draw from the k likeliest tokens; 0: from all", low=0)
    top_p: float = key("draw from the smallest set of tokens with this probability", low=1e-6, high=1)
    min_p: float = key("drop tokens less likely than this times the likeliest", low=0, high=1)
    repetition_penalty: float = key("above 1: tokens seen before become less likely", low=0.01)
    seed: int = key("the same seed draws the same tokens; with combine=slots on any number of ranks", low=0)
    stop: list[str] = key("end at this text; give the key again for several, empty for none", text=True)
    logprobs: int = key("write log-probabilities of the n likeliest tokens to `output`", low=0, high=100)
    ignore_eos: bool = key("go on after the end-of-text token")


@dataclass
class Runtime:
    """What a run may use."""

    device: str = key("where to run", names=("auto", "cpu", "cuda"))
    dtype: str = key("of activations and of weights outside the experts", names=("auto", "bfloat16", "float32"))
    threads: int = key("CPU threads of one rank", low=1, high=1024)
    timeout_s: float = key("a rank that does not answer for this many seconds is given up", low=1, high=10**6)
    start_timeout_s: float = key("a rank may be ready to run this many seconds after the first one", low=1, high=10**6)
    page: int = key("positions in one page of the key/value cache", low=1, high=65536)
    prefill_chunk: int = key("most tokens of prompts in one step; 0: 16384, on a CPU 2048", low=0)
    max_batch: int = key("most sequences at a time", low=1)
    cache_tokens: int = key("positions in the key/value cache; 0: what the requests and the memory allow", low=0)
    graphs: str = key("decode steps as CUDA graphs; auto: where possible", names=("auto", "true", "false"))
    progress: bool = key("progress bars on a terminal")
    profile: str = key("write a trace of every rank into this directory; graphs=false names its steps", text=True)


@dataclass
class Config:
    """What one run of `epmoe.generate` does."""

    checkpoint: str = key("directory or Hub id; empty: the embedded model", text=True)
    prompt: str | None = key("text to continue or to answer", text=True)
    prompts: str = key("a file is one prompt, so is standard input (-); .jsonl: one a line, as JSON", text=True)
    system: str | None = key("system message for the chat template", text=True)
    chat: str = key("apply the checkpoint's chat template", names=("auto", "on", "off"))
    output: str = key("write token ids, finish reasons and timings to this .jsonl file", text=True)
    max_new_tokens: int = key("most tokens to write for a prompt; the model's positions may allow fewer", low=1)
    quant: str = key("format of the experts in memory", names=("auto",), table="epmoe.formats:FORMATS")
    experts: str = key("backend of the experts' products", names=("auto",), table="epmoe.moe.experts:EXPERTS")
    router: str = key("backend of the router", names=("auto",), table="epmoe.moe.router:ROUTERS")
    combine: str = key("how ranks join their experts' outputs", names=("auto",), table="epmoe.moe.exchange:EXCHANGES")
    placement: str = key("which expert lives on which rank", table="epmoe.moe.placement:PLACEMENTS")
    mesh: Mesh = key("how the ranks are arranged")
    sampling: Sampling = key("how the next token is chosen")
    runtime: Runtime = key("devices, memory and time")


class Key(NamedTuple):
    """One leaf of the schema under its full name."""

    name: str
    type: Any
    about: str
    low: float | None
    high: float | None
    names: Sequence[str]
    table: str
    text: bool
    or_zero: bool

    def known(self) -> list[str]:
        """The values that this key may take; empty when it is no name."""
        if not self.table:
            return list(self.names)
        module, attribute = self.table.split(":")
        return [*self.names, *getattr(import_module(module), attribute)]


def _keys(schema: type, prefix: str = "") -> dict[str, Key]:
    found: dict[str, Key] = {}
    for item in fields(schema):
        name, kind = prefix + item.name, item.type
        if is_dataclass(kind):
            assert isinstance(kind, type)
            found |= _keys(kind, f"{name}.")
        else:
            found[name] = Key(name, kind, **item.metadata)
    return found


KEYS = _keys(Config)
GROUPS = {item.name: item for item in fields(Config) if is_dataclass(item.type)}


def conf_dir() -> Path:
    """conf/ inside the package in a wheel, beside the package in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def presets(group: str) -> dict[str, str]:
    """Names of a group's presets → what they are for (the comment on their first line)."""
    files = sorted((conf_dir() / group).glob("*.yaml"))
    return {file.stem: file.read_text().partition("\n")[0].lstrip("# ") for file in files}


def parse(argv: Sequence[str]) -> Config:
    """The configuration that `argv` (without the program's name) asks for, every value checked.

    `--help` and `--cfg job` print on rank 0 and raise SystemExit(0).

    Raises:
        UserError: an unknown key, preset or name, a wrong type, a value out of range, keys that exclude each other.
    """
    if "--help" in argv or "-h" in argv:
        _leave(_help())
    show, arguments = _take_cfg_option(argv)
    text: dict[str, Any] = {}
    overrides = []
    for argument in arguments:
        name, value = _split(argument)
        if name not in KEYS or not KEYS[name].text:
            overrides.append(_checked(name, value))
        elif KEYS[name].type == list[str]:
            text[name] = [*text.get(name, []), value] if value else []
        else:
            text[name] = value
    config = _compose(overrides)
    for name, value in text.items():
        _set(config, name, value)
    _check_all(config)
    if show:
        _leave(yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True))
    return config


def from_keys(values: Mapping[str, Any]) -> Config:
    """The configuration with some keys set from Python: `{"experts": "triton", "runtime": {"device": "cpu"}}`.

    A group takes a mapping of its keys, or the name of a preset: `{"runtime": "small"}`.

    Raises:
        UserError: an unknown key or preset, a wrong type, a value out of range.
    """
    presets_wanted = [
        _checked(name, value) for name, value in values.items() if name in GROUPS and isinstance(value, str)
    ]
    config = _compose(presets_wanted)
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if name in GROUPS and isinstance(value, Mapping):
            flat |= {f"{name}.{leaf}": each for leaf, each in value.items()}
        elif not (name in GROUPS and isinstance(value, str)):
            flat[name] = value
    for name, value in flat.items():
        if name not in KEYS:
            raise UserError(f"unknown key {name!r}{_known(name, [*KEYS, *GROUPS])}")
        kind = KEYS[name].type
        if not (_is_json(kind, value) or (kind not in _TYPES and (value is None or isinstance(value, str)))):
            raise UserError(f"{name}={value!r} is not {_TYPES.get(kind, 'text')}: it takes {_wanted(KEYS[name])}")
        _set(config, name, float(value) if kind is float else value)
    _check_all(config)
    return config


def update_sampling(base: Sampling, values: Mapping[str, Any], place: str) -> Sampling:
    """A copy of `base` with some keys changed, as a line of a JSON-lines file does; `place` names that line.

    Raises:
        UserError: an unknown key, a wrong type or a value out of range.
    """
    names = [item.name for item in fields(Sampling)]
    for name, value in values.items():
        if name not in names:
            raise UserError(f"{place}: unknown key {name!r}{_known(name, names)}")
        each = KEYS[f"sampling.{name}"]
        if not _is_json(each.type, value):
            raise UserError(f"{place}: {name}={value!r} is not {_TYPES[each.type]}")
        try:
            _check(each, value)
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
    return replace(base, **values)


_LARGEST = {int: 2**63 - 1, float: sys.float_info.max}  # what a tensor can hold; no infinity
_TYPES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list[str]: "a list of texts",
}


def _is_json(kind: Any, value: Any) -> bool:
    """Whether a value read from JSON is of a key's type; a whole number is a number, true is none."""
    if kind == list[str]:
        return isinstance(value, list) and all(isinstance(each, str) for each in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is kind


def _take_cfg_option(argv: Sequence[str]) -> tuple[bool, list[str]]:
    """Whether `--cfg job` was given, and the arguments without it."""
    rest = list(argv)
    if "--cfg" not in rest:
        return False, rest
    at = rest.index("--cfg")
    if rest[at + 1 : at + 2] != ["job"]:
        raise UserError("--cfg takes one word, job: write `--cfg job` to see the configuration")
    del rest[at : at + 2]
    return True, rest


def _split(argument: str) -> tuple[str, str]:
    """`name=value` at the first `=`; the name is a known key or group."""
    name, equals, value = argument.partition("=")
    plain = name.lstrip("+~")
    if name.startswith("-"):
        raise UserError(f"unknown option {name!r}; known: --help, --cfg job, and keys as key=value")
    if not equals and plain == name:
        raise UserError(f"argument {argument!r} is not of the form key=value; --help lists the keys")
    if plain not in KEYS and plain not in GROUPS:
        group = plain.partition(".")[0]
        known = [each for each in KEYS if each.startswith(f"{group}.")] if group in GROUPS else []
        known = known or [each for each in KEYS if "." not in each] + list(GROUPS)
        raise UserError(f"unknown key {name!r}{_known(plain, known, [*KEYS, *GROUPS])}")
    if plain != name:
        raise UserError(f"{name!r}: keys are neither added nor removed; write {plain}=value")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{name}={value!r} holds bytes that are not UTF-8: give the text in UTF-8") from None
    return name, value


def _checked(name: str, value: str) -> str:
    """The override for Hydra, after its preset or its type has been checked."""
    if name in GROUPS:
        if value not in presets(name):
            raise UserError(f"{name}={value!r} is an unknown preset{_known(value, list(presets(name)))}")
        return f"{name}={value}"
    try:
        override = OverridesParser.create().parse_override(f"{name}={value}")
    except HydraException:
        raise UserError(f"{name}={value!r} cannot be read: it takes {_wanted(KEYS[name])}") from None
    if override.is_sweep_override():
        raise UserError(f"{name}={value!r} holds several values: it takes {_wanted(KEYS[name])}")
    try:
        group, _, leaf = name.rpartition(".")
        typed = OmegaConf.structured(GROUPS[group].type if group else Config)
        typed[leaf] = override.value()
        # OmegaConf also takes ${...} and ???, which are for files, and any number for a truth value.
        fits = not OmegaConf.is_missing(typed, leaf) and not OmegaConf.is_interpolation(typed, leaf)
        fits = fits and (KEYS[name].type is not bool or isinstance(override.value(), bool))
    except OmegaConfBaseException:
        fits = False
    if not fits:
        raise UserError(f"{name}={value!r} is not {_TYPES[KEYS[name].type]}: it takes {_wanted(KEYS[name])}")
    quoted = KEYS[name].type is str and value in ("true", "false")  # words here; Hydra would make them True and False
    return f"{name}='{value}'" if quoted else f"{name}={value}"


def _compose(overrides: list[str]) -> Config:
    ConfigStore.instance().store(name="schema", node=Config)
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            config = OmegaConf.to_object(compose("config", overrides))
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        # The command line was checked before: what is left is a file in conf/.
        raise UserError(f"{conf_dir()}: {' '.join(str(error).split())}") from error
    assert isinstance(config, Config)
    return config


def _get(config: Config, name: str) -> Any:
    group, _, leaf = name.rpartition(".")
    return getattr(getattr(config, group) if group else config, leaf)


def _set(config: Config, name: str, value: Any) -> None:
    group, _, leaf = name.rpartition(".")
    setattr(getattr(config, group) if group else config, leaf, value)


def _check_all(config: Config) -> None:
    for each in KEYS.values():
        _check(each, _get(config, each.name))
    if config.prompt is not None and config.prompts:
        raise UserError(f"prompt and prompts={config.prompts!r} exclude each other: give one of them")


def _check(each: Key, value: Any) -> None:
    """Raises UserError when a value of the right type is no known name or out of range."""
    known = each.known()
    if known and value not in known:
        raise UserError(f"{each.name}={value!r} is unknown{_known(value, known)}")
    if each.type in (int, float):
        low = -_LARGEST[each.type] if each.low is None else each.low
        high = _LARGEST[each.type] if each.high is None else each.high
        in_range = low <= value <= high  # false for nan too
        if not (in_range or (each.or_zero and value == 0)):
            raise UserError(f"{each.name}={value} is out of range: it takes {_wanted(each)}")


def _wanted(each: Key) -> str:
    """What a key takes, in words."""
    if known := each.known():
        return "one of " + ", ".join(known)
    what = _TYPES.get(each.type, "text")
    if each.low is not None and each.high is not None:
        return f"{what} from {each.low} to {each.high}"
    zero = " 0 or" if each.or_zero else ""
    return what if each.low is None else f"{what},{zero} at least {each.low}"


def _known(wrong: str, known: list[str], candidates: list[str] | None = None) -> str:
    """The end of a message: what would have been right, and which of it is close to what was given."""
    close = get_close_matches(wrong, candidates or known, n=1)
    return f"; known: {', '.join(known)}" + (f" (did you mean {close[0]}?)" if close else "")


def _leave(message: str) -> None:
    """Print on rank 0, end every rank without an error."""
    if os.environ.get("RANK", "0") == "0":
        print(message.rstrip("\n"))
    raise SystemExit(0)


def _help() -> str:
    defaults = parse([])
    lines = [
        "Generate text from a mixture-of-experts checkpoint whose experts are shared by all ranks.",
        "",
        "  torchrun --nproc-per-node N -m epmoe.generate key=value ...",
        "  python -m epmoe.generate key=value ...                        on one rank",
        "",
        "Generated text goes to standard output, everything else to standard error.",
        "--cfg job shows the configuration instead of running it.",
        "",
        "Keys, each with its default:",
    ]
    lines += [_help_line(each, defaults) for each in KEYS.values() if "." not in each.name]
    for group, item in GROUPS.items():
        lines += ["", f"Group {group}, {item.metadata['about']}; its presets and its keys:"]
        for name, about in presets(group).items():
            default = " (default)" if name == _default_preset(group) else ""
            lines.append(f"  {f'{group}={name}':<32} {about}{default}")
        lines += [_help_line(each, defaults) for each in KEYS.values() if each.name.startswith(f"{group}.")]
    return "\n".join(lines)


def _default_preset(group: str) -> str:
    chosen = yaml.safe_load((conf_dir() / "config.yaml").read_text())["defaults"]
    return next(entry[group] for entry in chosen if not isinstance(entry, str) and group in entry)


def _help_line(each: Key, defaults: Config) -> str:
    value = _get(defaults, each.name)
    shown = "" if value is None or value == [] else str(value).lower() if isinstance(value, bool) else str(value)
    known = each.known()
    return f"  {f'{each.name}={shown}':<32} {each.about}" + (f": {', '.join(known)}" if known else "")
