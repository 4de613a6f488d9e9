"""Sampling that a request leaves out: from the configuration, else from the checkpoint, else greedy.

    the request  >  the configuration  >  generation_config.json  >  `otherwise` of the key (config/schema.py)

generation_config.json is read as vLLM does: what stands there counts, a library's own defaults (such as transformers'
top_k of 50) do not. do_sample is transformers': false is greedy, whatever temperature stands beside it; true without a
temperature is temperature 1.
"""

import secrets
from typing import TYPE_CHECKING, Any

from epmoe.config.keys import keys_of
from epmoe.config.schema import LLMConfig
from epmoe.engine.request import SamplingParams
from epmoe.errors import UserError
from epmoe.streams import tell

if TYPE_CHECKING:  # it brings torch, which text does without
    from epmoe.weights.checkpoint import Checkpoint

NAMES = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens")
SEED_BITS = 53  # of a drawn seed: JSON's readers keep all of them


def stored_params(checkpoint: "Checkpoint") -> dict[str, Any]:
    """What the checkpoint's generation_config.json says of sampling; a null is not said.

    Raises:
        UserError: a value of the wrong type or out of range; it names the file and the key.
    """
    file, keys = checkpoint.path / "generation_config.json", keys_of(SamplingParams)
    found = {}
    for name in NAMES:
        try:
            value = keys[name].accept(checkpoint.generation_config.get(name))
        except UserError as error:
            raise UserError(f"{file}: {error}; correct it, or remove it there") from None
        if value is not None:
            found[name] = value
    sampled = checkpoint.generation_config.get("do_sample")
    if sampled is not None and not isinstance(sampled, bool):
        raise UserError(f"{file}: do_sample={sampled!r} is not true or false; correct it, or remove it there")
    if sampled is False:
        found["temperature"] = 0.0
    elif sampled:
        found.setdefault("temperature", 1.0)
    return found


def default_params(config: LLMConfig, checkpoint: "Checkpoint") -> SamplingParams:
    """What holds for what a request leaves out; says in one line on standard error what of it generation_config.json
    says.

    Raises:
        UserError: see `stored_params`.
    """
    configured = SamplingParams(**vars(config.sampling), max_new_tokens=config.max_new_tokens)
    stored = stored_params(checkpoint)
    used = [f"{name}={value}" for name, value in stored.items() if getattr(configured, name) is None]
    if used:
        tell(f"epmoe: {', '.join(used)} (generation_config.json)")
    return configured.over(SamplingParams(**stored))


def decided(origin: str, params: SamplingParams, *, draw: bool) -> SamplingParams:
    """Parameters that nothing is left to ask of; with `draw` a seed is drawn where none is given and one is needed.

    Raises:
        UserError: several answers that would be the same one.
    """
    if params.n > 1 and not params.temperature:
        raise UserError(f"{origin}: n={params.n} answers would be one and the same: give a temperature above 0, or n=1")
    if draw and params.seed is None and params.temperature:
        params = params.over(SamplingParams(seed=secrets.randbits(SEED_BITS)))
    return params.settled()
