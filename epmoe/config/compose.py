"""From a command line, or from Python, to a checked configuration.

    parse(["prompt=Once upon", "sampling=sample", "sampling.seed=3"]) -> Config
    from_keys({"experts": "reference", "runtime": "cpu"}) -> LLMConfig

schema.py has the defaults, Hydra composes the presets' differences from conf/, and the keys that were given stand above
both, in any order. Their values never pass through Hydra, so that no character in a text means anything. Every mistake
is found here, before a process group starts, and is one line.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar, overload

import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from epmoe.config.keys import ByToken, Key, Names, Numbers, build, groups_of, keys_of, known_instead, respelled, scalar
from epmoe.config.schema import SPELLINGS, ChatConfig, Config, LLMConfig, ModelKeys, ServerConfig
from epmoe.errors import UserError

C = TypeVar("C", bound=ModelKeys)


@overload
def parse(argv: Sequence[str]) -> Config: ...
@overload
def parse(argv: Sequence[str], schema: type[C]) -> C: ...
def parse(argv: Sequence[str], schema: type[Any] = Config) -> Any:
    """The configuration that `argv` (without the program's name) asks for, every value checked.

    `--help` and `--cfg job` print on rank 0 and raise SystemExit(0).

    Raises:
        UserError: an unknown key, preset or name, a wrong type, a value out of range, keys that exclude each other.
    """
    if "--help" in argv or "-h" in argv:
        _leave(_help(schema))
    show, arguments = _without_cfg(argv)
    chosen: dict[str, str] = {}
    values: dict[str, Any] = {}
    for argument in arguments:
        name, word = _split(argument, schema)
        if name in groups_of(schema):
            chosen[name] = word
            continue
        if (each := _open_key(name, schema)) is not None:
            leaf = name.removeprefix(f"{each.name}.")
            values[each.name] = each.accept({**dict(values.get(each.name, ())), leaf: scalar(name, word)})
            continue
        each = _known_key(name, schema)
        value = each.read(word)
        values[name] = (*values.get(name, ()), *value) if each.collects and value else value
    config = _composed(schema, chosen, respelled(values, SPELLINGS))
    if show:
        _leave(yaml.safe_dump(_shown(config), sort_keys=False, allow_unicode=True))
    return config


@overload
def from_keys(keys: Mapping[str, Any]) -> LLMConfig: ...
@overload
def from_keys(keys: Mapping[str, Any], schema: type[C]) -> C: ...
def from_keys(keys: Mapping[str, Any], schema: type[Any] = LLMConfig) -> Any:
    """The configuration that Python values ask for: `experts`, `runtime.device`, or a whole group.

    A group takes the name of a preset (`runtime="cpu"`) or its keys (`runtime={"device": "cpu"}`). A text is a value as
    it is: nothing reads numbers or lists out of it.

    Raises:
        UserError: as `parse`.
    """
    chosen: dict[str, str] = {}
    values: dict[str, Any] = {}
    for name, value in keys.items():
        if (each := _open_key(name, schema)) is not None:
            values[each.name] = {**dict(values.get(each.name, ())), name.removeprefix(f"{each.name}."): value}
        elif name not in groups_of(schema):
            values[name] = value
        elif isinstance(value, Mapping):
            values |= {f"{name}.{leaf}": each for leaf, each in value.items()}
        else:
            chosen[name] = value
    for name, value in values.items():
        values[name] = _known_key(name, schema).accept(value)
    values = respelled(values, SPELLINGS)
    return _composed(schema, chosen, values)


def to_keys(config: ModelKeys) -> dict[str, Any]:
    """What `from_keys` makes `config` of again, by full name, as values that JSON can hold."""
    found = {name: attrgetter(name)(config) for name in keys_of(type(config))}
    return {name: dict(value) if keys_of(type(config))[name].names_its_own else value for name, value in found.items()}


def conf_dir() -> Path:
    """conf/ inside the package in a wheel, beside the package in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def presets(group: str) -> dict[str, str]:
    """Names of a group's presets → what they are for (the comment on their first line)."""
    files = sorted((conf_dir() / group).glob("*.yaml"))
    return {file.stem: file.read_text().partition("\n")[0].lstrip("# ") for file in files}


def default_presets() -> dict[str, str]:
    """Every group → the preset that holds when none is named."""
    root = yaml.safe_load((conf_dir() / "config.yaml").read_text()) or {}
    entries = [entry for entry in root.get("defaults", ()) if isinstance(entry, dict)]
    return {group: preset for entry in entries for group, preset in entry.items()}


def _composed(schema: type[C], chosen: Mapping[str, str], values: Mapping[str, Any]) -> C:
    """Defaults, under the presets of conf/ (`chosen`: by group), under `values`, which are checked already."""
    for group, preset in chosen.items():
        known = list(presets(group))
        if preset not in known:
            raise UserError(f"{group}={preset!r} is an unknown preset{known_instead(str(preset), known)}")
    config = build(schema, {**_from_files(schema, chosen), **values})
    config.check()
    return config


def _from_files(schema: type[ModelKeys], chosen: Mapping[str, str]) -> dict[str, Any]:
    """What conf/ has to say, by full name."""
    try:
        others = [f"~{group}" for group in default_presets() if group not in groups_of(schema)]
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            composed = compose("config", [*others, *(f"{group}={preset}" for group, preset in chosen.items())])
        found = _flat(OmegaConf.to_container(composed, resolve=True))
        known = keys_of(schema)
        for name in found:
            # Such a file is for all commands: a key that only another one has means nothing here.
            if name not in known and not _elsewhere(name):
                raise UserError(f"unknown key {name!r}{known_instead(name, list(known))}")
        return {name: known[name].accept(value) for name, value in found.items() if name in known}
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, UserError) as error:
        raise UserError(f"{conf_dir()}: {' '.join(str(error).split())}") from error


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested dictionaries by full name."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def _heeded(schema: type[ModelKeys]) -> dict[str, Key]:
    """The keys that mean something to `schema`, by full name."""
    return {name: each for name, each in keys_of(schema).items() if name not in schema.ignored}


def _top(schema: type[ModelKeys]) -> list[str]:
    """The names of keys of no group, and of the groups."""
    return [*(name for name in keys_of(schema) if "." not in name), *groups_of(schema)]


def _open_key(name: str, schema: type[ModelKeys]) -> Key | None:
    """The key that `name` gives a value under a name of its own: `template` of template.NAME."""
    key, dot, leaf = name.partition(".")
    found = _heeded(schema).get(key)
    return found if found is not None and found.names_its_own and dot and leaf.isidentifier() else None


def _known_key(name: str, schema: type[ModelKeys], given: str = "") -> Key:
    """The key of that name (`given`: how it was spelled); UserError when it means nothing to this schema."""
    keys, groups = _heeded(schema), groups_of(schema)
    name = SPELLINGS.get(name, name)
    if name in keys:
        return keys[name]
    if name in schema.ignored or _elsewhere(name) or _open_key(name, Config):
        raise UserError(f"{name} means nothing to {schema.subject}; known: {', '.join(_top(schema))}")
    group = name.partition(".")[0]
    known = [each for each in keys if each.startswith(f"{group}.")] if group in groups else _top(schema)
    raise UserError(f"unknown key {(given or name)!r}{known_instead(name, known, [*keys, *groups])}")


def _elsewhere(name: str) -> bool:
    """Whether a command has such a key or group."""
    return any(name in keys_of(each) or name in groups_of(each) for each in (Config, ServerConfig, ChatConfig))


def _split(argument: str, schema: type[ModelKeys]) -> tuple[str, str]:
    """`name=word` at the first `=`; the name is a known key or group."""
    name, equals, word = argument.partition("=")
    plain = name.lstrip("+~")
    if name.startswith("-"):
        raise UserError(f"unknown option {name!r}; known: --help, --cfg job, and keys as key=value")
    if not equals and plain == name:
        known = ", ".join(_top(schema))
        raise UserError(f"argument {argument!r} is not of the form key=value; known: {known} (--help explains them)")
    if plain not in groups_of(schema) and _open_key(plain, schema) is None:
        _known_key(plain, schema, name)
    if plain != name:
        raise UserError(f"{name!r}: keys are neither added nor removed; write {plain}=value")
    try:
        word.encode()
    except UnicodeEncodeError:
        raise UserError(f"{name}={word!r} holds bytes that are not UTF-8: give the text in UTF-8") from None
    return name, word


def _without_cfg(argv: Sequence[str]) -> tuple[bool, list[str]]:
    """Whether `--cfg job` was given, and the arguments without it."""
    rest = list(argv)
    if "--cfg" not in rest:
        return False, rest
    at = rest.index("--cfg")
    if rest[at + 1 : at + 2] != ["job"]:
        raise UserError("--cfg takes one word, job: write `--cfg job` to see the configuration")
    del rest[at : at + 2]
    return True, rest


def _shown(config: ModelKeys) -> dict[str, Any]:
    """All that `config` holds and heeds, as plain values."""
    shown, keys = asdict(config), keys_of(type(config))
    for name in config.ignored:
        group, _, leaf = name.rpartition(".")
        del (shown[group] if group else shown)[leaf]
    return {name: dict(each) if name in keys and keys[name].names_its_own else each for name, each in shown.items()}


def _leave(message: str) -> None:
    """Print on rank 0, end every rank without an error."""
    if os.environ.get("RANK", "0") == "0":
        print(message.rstrip("\n"))
    raise SystemExit(0)


def _help(schema: type[ModelKeys]) -> str:
    defaults = _flat(asdict(_composed(schema, {}, {})))
    entries = {name: _help_line(each, defaults[name]) for name, each in _heeded(schema).items()}
    lines = [
        schema.usage,
        "--cfg job shows the configuration instead of running it.",
        "",
        "Keys, each with its default:",
        *(entry for name, entry in entries.items() if "." not in name),
    ]
    for group, about in groups_of(schema).items():
        lines += ["", f"Group {group}, {about}; its presets and its keys:"]
        for name, purpose in presets(group).items():
            default = " (default)" if name == default_presets().get(group) else ""
            lines.append(f"  {f'{group}={name}':<32} {purpose}{default}")
        lines += [entry for name, entry in entries.items() if name.startswith(f"{group}.")]
    return "\n".join(lines)


def _help_line(each: Key, default: Any) -> str:
    values = ""
    if isinstance(each.allowed, Names):
        values = ": " + ", ".join([*each.allowed.known(), *(["package.module:Class"] if each.allowed.open else [])])
    elif isinstance(each.allowed, Numbers | ByToken):
        values = f" ({each.wanted()})"
    return f"  {f'{each.name}={each.spelled(default)}':<32} {each.about}{values}"
