"""Models, by the `model_type` of a checkpoint's config.json.

A model class is an `nn.Module` that knows neither ranks nor collectives nor backends:

    Config.from_json(dict) -> its config       of a parsed config.json; raises UserError that names the key
    __init__(config)                           built under `torch.device("meta")`; the loader assigns every parameter
    forward(step, cache: Cache)                logits_OV in float32 of the rows a Step wants, or all of a DecodeStep
    vocab_chunk                                a DecodeStep may ask for ids from and up to multiples of this only
    moe_layers() -> list[MoE]                  in layer order; the loader installs their experts
    shared_tensors(config) -> dict             {name in the checkpoint: Place} of all but the experts
    expert_names(layer) -> 4 names             gate_up, its bias, down, its bias; a format adds its suffixes, and a bias
                                               that the family does not have is None

Its config offers `layers`, `hidden`, `intermediate`, `num_experts`, `activation` to the loader, `windows`, `kv_heads`,
`head_dim` to the cache, `vocab`, `max_positions` to the engine.
"""

from typing import Any, NamedTuple, Protocol

import torch

MODELS = {"gpt_oss": "epmoe.models.gpt_oss:GptOss"}


class Place(NamedTuple):
    """Where a stored tensor goes: a parameter of the model or, where several make one matrix, a run of its rows.

    The places of one parameter follow each other and leave nothing out.
    """

    parameter: str
    rows: tuple[int, int] | None = None  # first and last + 1; None: all

    def of(self, parameter: torch.Tensor) -> torch.Tensor:
        """The rows of the parameter, as a view."""
        return parameter if self.rows is None else parameter[self.rows[0] : self.rows[1]]


class Model(Protocol):
    config: Any
    vocab_chunk: int

    def __call__(self, step: Any, cache: Any, /) -> torch.Tensor: ...

    def distinct(self, tokens: int, prompts: int) -> set[tuple[int, int]]: ...
