"""Reading a checkpoint's config.json: typed values, and an error that names the key."""

import math
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any

import torch

from epmoe.errors import UserError, warn
from epmoe.layers.rotary import Rope

_REQUIRED = object()
OUTSIDE = ("rope_theta", "partial_rotary_factor")  # of the rotary settings: keys that may stand beside their object
SMALLEST, LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


class Keys:
    """The keys of one JSON object. Every method raises UserError for a key that is missing or of the wrong type.

    `end` says which keys were left out, and which ones nobody asked for that look like one that is not there.

    Args:
        prefix: of the keys, in messages.
        standard: what transformers takes for keys that are left out.
    """

    def __init__(
        self, values: Mapping[str, Any], file: str, prefix: str = "", standard: Mapping[str, Any] | None = None
    ) -> None:
        self.values, self.file, self.prefix, self.standard = values, file, prefix, standard or {}
        self.asked: set[str] = set()
        self.left_out: dict[str, Any] = {}

    def error(self, name: str, complaint: str, *, shown: bool = True) -> UserError:
        """The error about key `name`; `complaint` says what is wrong with its value and what would be right."""
        value = f"={self.values.get(name, self.standard.get(name))!r}" if shown else ""
        return UserError(f"{self.file}: {self.prefix}{name}{value} {complaint}")

    def has(self, name: str) -> bool:
        """Whether the key is there; null counts as absent, as in transformers."""
        self.asked.add(name)
        return self.values.get(name) is not None

    def _get(self, name: str, default: Any) -> Any:
        if self.has(name):
            return self.values[name]
        if default is not _REQUIRED:
            return default
        if name not in self.standard:
            raise self.missing(name)
        self.left_out[name] = self.standard[name]
        return self.standard[name]

    def missing(self, name: str, *others: str) -> UserError:
        """The error about a key, or one of several, that is not there; it names a key that looks like it."""
        either = f" (or {' or '.join(others)})" if others else ""
        near = self._near((name, *others))
        hint = f"; is {self.prefix}{next(iter(near))} a misspelling of it?" if near else ""
        return UserError(f"{self.file}: {self.prefix}{name}{either} is missing, and the model needs it{hint}")

    def end(self, *elsewhere: str) -> None:
        """All keys that mean something were asked for, or are asked for `elsewhere`: warn of others that look like one
        that is not there.
        """
        self.asked |= set(elsewhere)
        if self.left_out:
            taken = ", ".join(f"{self.prefix}{name}={value!r}" for name, value in self.left_out.items())
            warn(f"{self.file} leaves keys out, which are taken as transformers takes them: {taken}")
        for wrong, right in self._near(self.asked).items():
            warn(
                f"{self.file}: {self.prefix}{wrong} is a key that nothing reads, and {right}, which it resembles, is "
                "not there: if it was meant, correct it; until then its default holds"
            )

    def _near(self, names: Collection[str]) -> dict[str, str]:
        """{a key that nobody asked for: the one of `names` that it resembles}, of names that are not there."""
        absent = {_plain(name): name for name in names if self.values.get(name) is None}
        found = {}
        for wrong in set(self.values) - self.asked - set(names):
            if close := get_close_matches(_plain(wrong), absent, n=1, cutoff=0.8):
                found[wrong] = absent[close[0]]
        return dict(sorted(found.items()))

    def positive(self, name: str) -> int:
        value = self._get(name, _REQUIRED)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
            raise self.error(name, "must be a whole number above 0 and below 2^31")
        return value

    def number(self, name: str, default: Any = _REQUIRED) -> float:
        """A number above 0 that float32, in which the model computes, can hold."""
        value = self._get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not SMALLEST <= value <= LARGEST:
            raise self.error(name, f"must be a number from {SMALLEST:.3g} to {LARGEST:.3g}, as float32 holds them")
        return float(value)

    def flag(self, name: str, default: Any = _REQUIRED) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, "must be true or false")
        return value

    def text(self, name: str, default: Any = _REQUIRED) -> str:
        value = self._get(name, default)
        if not isinstance(value, str):
            raise self.error(name, "must be a string")
        return value

    def strings(self, name: str, default: Any = _REQUIRED) -> list[str]:
        value = self._get(name, default)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(name, "must be a list of strings")
        return value

    def agree(self, name: str, alias: str) -> None:
        """Two keys that say the same thing must say the same value, where both are there."""
        if self.has(name) and self.has(alias) and self.values[name] != self.values[alias]:
            raise self.error(name, f"contradicts {self.prefix}{alias}={self.values[alias]!r}")


def _plain(name: str) -> str:
    """What people confuse left out: case and separators."""
    return name.lower().replace("_", "").replace("-", "")


def read_rope(keys: Keys, head_dim: int) -> Rope:
    """The rotary settings, in either published spelling: `rope_scaling` + `rope_theta`, or `rope_parameters`.

    beta_fast, beta_slow and truncate default to 32, 1 and true, as the format (transformers' YaRN) defines them; all of
    it to what is standard for the family, where neither spelling is there.
    """
    rope = _rope_keys(keys)
    kind = "rope_type" if rope.has("rope_type") else "type"  # `type` is the older name
    if not rope.has(kind):
        raise rope.missing("rope_type")
    if rope.text(kind) != "yarn":
        raise rope.error(kind, "is not supported; known: yarn")
    if rope.number("partial_rotary_factor", 1.0) != 1.0:
        raise rope.error("partial_rotary_factor", "is not supported; known: 1.0")
    theta, factor = rope.number("rope_theta"), rope.number("factor")
    if theta <= 1:
        raise rope.error("rope_theta", "must be above 1")
    found = Rope(
        head_dim=head_dim,
        theta=theta,
        factor=factor,
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        original_max_position=rope.positive("original_max_position_embeddings"),
        truncate=rope.flag("truncate", True),
        concentration=_concentration(rope, factor),
    )
    rope.end()
    return found


def _rope_keys(keys: Keys) -> Keys:
    """The settings of both spellings as one object; where both give a value, they must agree."""
    found: dict[str, Any] = {}
    origin: dict[str, str] = {}
    spellings: list[tuple[str, Mapping[str, Any]]] = []
    for name in ("rope_scaling", "rope_parameters"):
        if keys.has(name):
            if not isinstance(keys.values[name], dict):
                raise keys.error(name, "must be an object")
            spellings.append((f"{name}.", keys.values[name]))
    if not spellings:
        if "rope_parameters" not in keys.standard:
            raise keys.missing("rope_scaling", "rope_parameters")
        keys.left_out["rope_parameters"] = standard = keys.standard["rope_parameters"]
        spellings.append(("rope_parameters.", standard))
    spellings.append(("", {name: keys.values[name] for name in OUTSIDE if keys.has(name)}))
    for prefix, values in spellings:
        for name, value in values.items():
            if value is None:
                continue
            if name in found and found[name] != value:
                raise UserError(
                    f"{keys.file}: {prefix}{name}={value!r} contradicts {origin[name]}{name}={found[name]!r}"
                )
            found[name], origin[name] = value, prefix
    theta = {name: keys.standard[name] for name in ("rope_theta",) if name in keys.standard}
    return Keys(found, keys.file, spellings[0][0], theta)


def _concentration(rope: Keys, factor: float) -> float:
    """YaRN's factor on cos and sin: 0.1·ln(factor) + 1, unless the configuration gives it or DeepSeek's two mscales."""

    def scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.has("attention_factor"):
        return rope.number("attention_factor")
    if rope.has("mscale") and rope.has("mscale_all_dim"):
        return scale(rope.number("mscale")) / scale(rope.number("mscale_all_dim"))
    return scale(1.0)
