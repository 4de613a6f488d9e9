"""Models, by the `model_type` of a checkpoint's config.json.

A model class knows neither ranks nor collectives nor backends. It is an `nn.Module`, made from its config under
`torch.device("meta")`; the loader assigns every parameter and installs the experts.
"""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import torch
from torch import nn

from epmoe.batch import Step
from epmoe.cache.cache import Cache
from epmoe.cache.plan import Plan
from epmoe.layers.heads import Part, Share
from epmoe.moe.experts import GatedActivation
from epmoe.moe.layer import MoE

MODELS = {"gpt_oss": "epmoe.models.gpt_oss:GptOss"}


class Target(NamedTuple):
    """Where a stored tensor goes: a parameter of the model or, where several make one matrix, a run of its rows.

    The targets within one parameter follow each other and leave nothing out.
    """

    parameter: str
    rows: tuple[int, int] | None = None  # first and last + 1; None: all
    stored: Part | None = None  # of the stored tensor's rows; None: all

    def of(self, parameter: torch.Tensor) -> torch.Tensor:
        """The rows of the parameter, as a view."""
        return parameter if self.rows is None else parameter[self.rows[0] : self.rows[1]]

    def part(self, whole: torch.Tensor) -> torch.Tensor:
        """What goes there of the stored tensor, as a view."""
        return whole if self.stored is None else whole[self.stored.begin : self.stored.end]


class ModelConfig(Protocol):
    """What others ask of a model's architecture."""

    @property
    def layers(self) -> int: ...
    @property
    def hidden(self) -> int: ...
    @property
    def intermediate(self) -> int: ...
    @property
    def num_experts(self) -> int: ...
    @property
    def top_k(self) -> int: ...
    @property
    def activation(self) -> GatedActivation: ...
    @property
    def windows(self) -> Sequence[int | None]:
        """One a layer; None: full attention."""
        ...

    @property
    def heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def vocab(self) -> int: ...
    @property
    def max_positions(self) -> int: ...


def values(model: ModelConfig) -> float:
    """Weights that a model reads for a token, about; those of experts count as a quarter, for their 4 bits."""
    attention = 2 * model.hidden * (model.hidden + model.kv_heads * model.head_dim)
    experts = 3 * model.hidden * model.intermediate * model.top_k / 4
    return model.layers * (attention + experts) + model.vocab * model.hidden


class Model(Protocol):
    """What the engine runs."""

    @property
    def config(self) -> ModelConfig: ...
    @property
    def vocab_chunk(self) -> int:
        """Parts of the vocabulary that are asked for begin at multiples of this."""
        ...

    def hidden(self, step: Step, cache: Cache, /) -> torch.Tensor:
        """[O, H], what the projection to the vocabulary takes of each token whose logits are wanted."""
        ...

    def logits(self, norm_OH: torch.Tensor, part: tuple[int, int] | None, /) -> torch.Tensor:
        """[O, V] in float32, or first : last + 1 of the vocabulary's ids."""
        ...

    def distinct(self, tokens: int, prompts: int) -> set[tuple[int, int]]:
        """Kinds of prefill that compile anew: tokens together, and tokens of one prompt at most.

        Of up to `tokens` tokens, and of up to `prompts` prompts with several tokens.
        """
        ...

    # What a draft model reads: the residual stream in front of these layers, side by side, of the last step's tokens.
    feature_layers: tuple[int, ...]
    feature_TX: torch.Tensor | None

    def sublayers(self) -> list[tuple[str, nn.Module]]:
        """Its parts and what to call them in a message, in the order in which numbers pass through them."""
        ...


class DraftModel(Protocol):
    """A trained head that drafts (EAGLE3): one layer over features of the model, and over its own results."""

    @property
    def config(self) -> "DraftShape": ...
    @property
    def values(self) -> int:
        """Weights that it reads for a token."""
        ...

    def fuse(self, feature_TX: torch.Tensor, /) -> torch.Tensor:
        """[T, features · H] → [T, H]."""
        ...

    def __call__(
        self,
        token_T: torch.Tensor,
        feature_TH: torch.Tensor,
        position_T: torch.Tensor,
        cached: tuple[torch.Tensor, torch.Tensor],
        plan: Plan,
        /,
    ) -> torch.Tensor:
        """[T, H], its residual stream. Writes keys and values into `cached` as `plan` says.

        Args:
            token_T: the token behind each position.
            feature_TH: what `fuse` gives of the position, or this function of the position before.
        """
        ...

    def propose(self, hidden_BH: torch.Tensor, /) -> torch.Tensor:
        """The likeliest ids of the model's vocabulary behind `token_T`: int64 [B]."""
        ...


class DraftShape(Protocol):
    """What the engine asks of its configuration."""

    @property
    def layers(self) -> tuple[int, ...]:
        """The residual stream in front of these layers of the model is its feature."""
        ...

    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


class Family(Model, Protocol):
    """What a class of MODELS is: a model, and what its checkpoints call its tensors."""

    Config: ClassVar[Any]  # its `from_json` makes the config of a parsed config.json; a UserError names the key

    def __init__(self, config: Any) -> None: ...

    def __call__(self, step: Step, cache: Cache, /) -> torch.Tensor:
        """Logits [O, V] in float32: `hidden` and `logits` in one."""
        ...

    # Of nn.Module.
    def get_submodule(self, target: str) -> nn.Module: ...
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    def named_buffers(self) -> Iterator[tuple[str, torch.Tensor]]: ...
    def requires_grad_(self, requires_grad: bool) -> Self: ...
    def eval(self) -> Self: ...

    def moe_layers(self) -> list[MoE]:
        """In layer order."""
        ...

    def shared_tensors(self) -> dict[str, Target]:
        """{name in the checkpoint: its target} of every tensor but the experts'; with a share of heads, the part."""
        ...

    def share_heads(self, share: Share) -> None:
        """Have these heads alone in each layer, while its parameters are on meta. Calls are collectives then."""
        ...

    @property
    def own_kv_heads(self) -> int:
        """Key/value heads of a layer on this rank, whose keys and values the cache holds."""
        ...

    def expert_names(self, layer: int) -> tuple[str, str | None, str, str | None]:
        """Names of gate_up, its bias, down and its bias; a format adds its suffixes. None: the family has no bias."""
        ...
