"""What a user may choose of a loaded model's parts, and what `auto` stands for.

Backends say themselves what they serve: `auto` is the first of a table that fits, and no name of one stands here.
"""

from collections.abc import Set
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch

from epmoe.config.schema import Hub, ModelKeys
from epmoe.errors import UserError
from epmoe.moe import exchange
from epmoe.moe.exchange import EXCHANGES
from epmoe.moe.experts import EXPERTS, Experts
from epmoe.moe.placement import PLACEMENTS, Placement
from epmoe.moe.router import ROUTERS, Router
from epmoe.ranks.mesh import Ranks
from epmoe.streams import tell
from epmoe.tables import lookup

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

AUTO = "auto"


@dataclass(frozen=True)
class Choices:
    """Names, or auto: what fits the checkpoint and the device.

    `placement` and `attention` have no auto: ranks must agree on them.
    """

    quant: str = AUTO  # of FORMATS; auto: the format that the checkpoint stores
    experts: str = AUTO  # of EXPERTS, or package.module:Class
    router: str = AUTO  # of ROUTERS
    combine: str = AUTO  # of EXCHANGES; auto: by `attention` and the number of nodes
    placement: str = "contiguous"  # of PLACEMENTS
    dtype: str = AUTO  # of DTYPES, of all but the experts' matrices; auto: bfloat16 on an accelerator, else float32
    scale: str = "ocp"  # of SCALES: how values are rounded where they are brought into another format
    attention: str = "replicate"  # on each rank whole, shared by heads ("tensor"), or of its own requests ("data")
    hub: Hub = field(default_factory=Hub)  # what an expert backend may ask for: `experts_of`

    @classmethod
    def of(cls, keys: ModelKeys) -> Self:
        """What the configuration says."""
        names = (keys.quant, keys.experts, keys.router, keys.combine, keys.placement, keys.runtime.dtype)
        return cls(*names, scale=keys.quant_scale, attention=keys.mesh.attention, hub=keys.hub)

    @property
    def names(self) -> dict[str, str]:
        """The parts by their keys."""
        found = {item.name: getattr(self, item.name) for item in fields(self)}
        return {key: value for key, value in found.items() if isinstance(value, str)}


def resolve(asked: Choices, formats: Set[str], ranks: Ranks) -> Choices:
    """`asked` with a name in the place of every auto; says on standard error what auto chose.

    Args:
        formats: that the experts' matrices shall have.
    Raises:
        UserError: an unknown name, or an expert backend that does not run the formats.
    """
    auto = {
        # A layer that modules_to_not_convert leaves in bf16 does not make it a bf16 model.
        "quant": next((name for name in sorted(formats) if name != "bf16"), "bf16"),
        "experts": _first_experts(ranks.device, formats),
        "router": _first_router(ranks.device),
        "combine": exchange.automatic(ranks.nodes, asked.attention),
        "dtype": "float32" if ranks.device.type == "cpu" else "bfloat16",
    }
    chosen: dict[str, Any] = {key: name for key, name in auto.items() if getattr(asked, key) == AUTO}
    names = replace(asked, **chosen)
    if names.dtype not in DTYPES:
        raise UserError(f"dtype={names.dtype!r} is unknown; known: {', '.join(DTYPES)}")
    router_class(names.router)
    lookup("combine", EXCHANGES, names.combine)
    exchange.check(names.combine, ranks.expert_size, names.attention)
    runs = experts_class(names.experts).formats
    if not formats <= runs:
        raise UserError(
            f"experts={names.experts} does not run {', '.join(sorted(formats - runs))}, only "
            f"{', '.join(sorted(runs))}: choose another backend or another quant"
        )
    if chosen and ranks.is_main:
        tell(f"epmoe: auto chose {', '.join(f'{key}={name}' for key, name in chosen.items())}")
    return names


def experts_class(name: str) -> type[Experts]:
    """The expert backend `name`: of the table, or package.module:Class.

    Raises:
        UserError: see `lookup`.
    """
    found: type[Experts] = lookup("experts", EXPERTS, name, Experts)
    return found


def experts_of(chosen: Choices) -> type[Experts]:
    """The chosen backend, with what the configuration says of it: a class that has `configured` takes it.

    Raises:
        UserError: what it says cannot be.
    """
    found = experts_class(chosen.experts)
    configured = getattr(found, "configured", None)
    made: type[Experts] = found if configured is None else configured(chosen.hub)
    return made


def router_class(name: str) -> type[Router]:
    """The router `name`.

    Raises:
        UserError: see `lookup`.
    """
    found: type[Router] = lookup("router", ROUTERS, name)
    return found


def placement_of(name: str, num_experts: int, ranks: Ranks) -> Placement:
    """The placement `name` of so many experts over the ranks.

    Raises:
        UserError: an unknown name, more ranks than experts.
    """
    found: Placement = lookup("placement", PLACEMENTS, name)(num_experts, ranks.expert_size)
    return found


def waiting(names: Choices) -> tuple[str, ...]:
    """What of these parts waits for the device in a step, as "key=name"."""
    waits = {"experts": experts_class(names.experts).waits, "router": router_class(names.router).waits}
    return tuple(f"{key}={getattr(names, key)}" for key, value in waits.items() if value)


def _first_experts(device: torch.device, formats: Set[str]) -> str:
    found = (name for name in EXPERTS if (each := experts_class(name)).serves(device) and formats <= each.formats)
    return next(found)  # `reference` runs everything, everywhere


def _first_router(device: torch.device) -> str:
    return next(name for name in ROUTERS if router_class(name).serves(device))
