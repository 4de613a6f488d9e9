"""Reading a checkpoint's config.json: typed values, and an error that names the key."""

import math
import sys
from collections.abc import Mapping
from typing import Any

from epmoe.errors import UserError
from epmoe.layers.rotary import Rope

_REQUIRED = object()


class Keys:
    """The keys of one JSON object. Every method raises UserError for a key that is missing or of the wrong type."""

    def __init__(self, values: Mapping[str, Any], file: str, prefix: str = "") -> None:
        self.values, self.file, self.prefix = values, file, prefix

    def error(self, name: str, complaint: str, *, shown: bool = True) -> UserError:
        """The error about key `name`; `complaint` says what is wrong with its value and what would be right."""
        value = f"={self.values[name]!r}" if shown else ""
        return UserError(f"{self.file}: {self.prefix}{name}{value} {complaint}")

    def has(self, name: str) -> bool:
        """Whether the key is there; null counts as absent, as in transformers."""
        return self.values.get(name) is not None

    def _get(self, name: str, default: Any) -> Any:
        if self.has(name):
            return self.values[name]
        if default is _REQUIRED:
            raise UserError(f"{self.file}: {self.prefix}{name} is missing, and the model needs it")
        return default

    def positive(self, name: str) -> int:
        value = self._get(name, _REQUIRED)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
            raise self.error(name, "must be a whole number above 0 and below 2^31")
        return value

    def number(self, name: str, default: Any = _REQUIRED) -> float:
        """A finite number above 0."""
        value = self._get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
            raise self.error(name, "must be a number above 0")
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

    def strings(self, name: str) -> list[str]:
        value = self._get(name, _REQUIRED)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(name, "must be a list of strings")
        return value

    def agree(self, name: str, alias: str) -> None:
        """Two keys that say the same thing must say the same value, where both are there."""
        if self.has(name) and self.has(alias) and self.values[name] != self.values[alias]:
            raise self.error(name, f"contradicts {self.prefix}{alias}={self.values[alias]!r}")


def read_rope(keys: Keys, head_dim: int) -> Rope:
    """The rotary settings, in either published spelling: `rope_scaling` + `rope_theta`, or `rope_parameters`.

    beta_fast, beta_slow and truncate default to 32, 1 and true, as the format (transformers' YaRN) defines them.
    """
    rope = _rope_keys(keys)
    kind = "rope_type" if rope.has("rope_type") else "type"  # `type` is the older name
    if not rope.has(kind):
        raise UserError(f"{keys.file}: {rope.prefix}rope_type is missing, and the model needs it")
    if rope.text(kind) != "yarn":
        raise rope.error(kind, "is not supported; known: yarn")
    if rope.number("partial_rotary_factor", 1.0) != 1.0:
        raise rope.error("partial_rotary_factor", "is not supported; known: 1.0")
    theta, factor = rope.number("rope_theta"), rope.number("factor")
    if theta <= 1:
        raise rope.error("rope_theta", "must be above 1")
    return Rope(
        head_dim=head_dim,
        theta=theta,
        factor=factor,
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        original_max_position=rope.positive("original_max_position_embeddings"),
        truncate=rope.flag("truncate", True),
        concentration=_concentration(rope, factor),
    )


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
        raise UserError(f"{keys.file}: rope_scaling (or rope_parameters) is missing, and the model needs it")
    spellings.append(("", {"rope_theta": keys.values.get("rope_theta")}))
    for prefix, values in spellings:
        for name, value in values.items():
            if value is None:
                continue
            if name in found and found[name] != value:
                raise UserError(
                    f"{keys.file}: {prefix}{name}={value!r} contradicts {origin[name]}{name}={found[name]!r}"
                )
            found[name], origin[name] = value, prefix
    return Keys(found, keys.file, spellings[0][0])


def _concentration(rope: Keys, factor: float) -> float:
    """YaRN's factor on cos and sin: 0.1·ln(factor) + 1, unless the configuration gives it or DeepSeek's two mscales."""

    def scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.has("attention_factor"):
        return rope.number("attention_factor")
    if rope.has("mscale") and rope.has("mscale_all_dim"):
        return scale(rope.number("mscale")) / scale(rope.number("mscale_all_dim"))
    return scale(1.0)
