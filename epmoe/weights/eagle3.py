"""An EAGLE3 head's directory: config.json and model.safetensors, as vLLM, SGLang and NVIDIA publish them.

    fc.weight [H, 3H] · norm.weight · lm_head.weight [draft vocabulary, H] · midlayer.* or layers.0.*, a Llama layer's
    d2t int64 [draft vocabulary]     target id = draft id + d2t; may lack where the head has the whole vocabulary
    t2d bool [vocabulary]            which ids these are; may lack
    embed_tokens.weight              where it lacks, the target's embedding is the head's

Everything is compared with config.json and with the model before a weight is read.
"""

from pathlib import Path

import torch
from torch import nn

from epmoe.errors import UserError
from epmoe.models import Target
from epmoe.models.decoder import DecoderConfig
from epmoe.models.eagle3 import LAYER, MIDLAYER, NOTHING, Eagle3, HeadConfig
from epmoe.weights.checkpoint import SINGLE, Checkpoint
from epmoe.weights.load import assign, fitting

Promise = tuple[tuple[int, ...], tuple[torch.dtype, ...]]  # a tensor's shape, and the dtypes that it may have
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
EMBEDDING, TO_TARGET, FROM_TARGET = "embed_tokens.weight", "d2t", "t2d"
UNREAD = "rotary_emb.inv_freq"  # old files hold what follows from config.json
PICKLED = "pytorch_model.bin"


def open_head(path: str | Path, model: DecoderConfig) -> HeadConfig:
    """The head's architecture, for use beside `model`; the files' headers are what it promises. Reads no weights.

    Raises:
        UserError: what is wrong, where, and what to do; one line.
    """
    checkpoint = _open(path)
    config = _config(checkpoint, model)
    _check(checkpoint, config)
    return config


def load_head(
    path: str | Path, config: HeadConfig, target: nn.Embedding, device: torch.device | str, dtype: torch.dtype
) -> Eagle3:
    """The head that `open_head` has found good, in evaluation mode, without gradients.

    Args:
        target: the model's embedding, on `device` in `dtype`: the head's, where the file holds none.

    Raises:
        UserError: ids that are none of the model's, or too little memory.
    """
    checkpoint, device = _open(path), torch.device(device)
    layer = _check(checkpoint, config)
    with torch.device("meta"):
        head = Eagle3(config)
    targets = head.stored_tensors(layer)
    need = sum(parameter.numel() for _, parameter in head.named_parameters()) * dtype.itemsize
    if EMBEDDING in checkpoint.tensors:
        targets[EMBEDDING] = Target("embedding.weight")
    else:
        need -= target.weight.numel() * dtype.itemsize
        head.embedding = target
    target_D = _target_ids(checkpoint, config)
    with fitting(need, device):
        for name, place in targets.items():
            assign(head, place, checkpoint.read(name, device, dtype))
        head.target_D = target_D.to(device)
        head.sinks = torch.full((config.heads,), NOTHING, dtype=dtype, device=device)
    checkpoint.close()
    tensors = [value for _, value in (*head.named_parameters(), *head.named_buffers())]
    assert not any(value.is_meta for value in tensors), "a tensor was not loaded"
    return head.eval().requires_grad_(False)


def _open(path: str | Path) -> Checkpoint:
    path = Path(path).expanduser()
    if (path / PICKLED).is_file() and not list(path.glob("*.safetensors")):
        raise UserError(f"head {path} holds {PICKLED}, which is not read: convert it to {SINGLE}")
    return Checkpoint.open(path)


def _config(checkpoint: Checkpoint, model: DecoderConfig) -> HeadConfig:
    try:
        return HeadConfig.from_json(checkpoint.config, model)
    except UserError as error:
        raise UserError(f"head {checkpoint.path}: {error}") from error


def _check(checkpoint: Checkpoint, config: HeadConfig) -> str:
    """Compare the headers with config.json; which of the two names the file has for the layer."""
    found = {name: info for name, info in checkpoint.tensors.items() if not name.endswith(UNREAD)}
    layer = LAYER if any(name.startswith(LAYER) for name in found) else MIDLAYER
    with torch.device("meta"):
        head = Eagle3(config)
    parameters = dict(head.named_parameters())
    promised: dict[str, Promise]
    promised = {name: (tuple(place.of(parameters[place.parameter]).shape), FLOATS)
                for name, place in head.stored_tensors(layer).items()}  # fmt: skip
    optional: dict[str, Promise]
    optional = {EMBEDDING: ((config.vocab, config.hidden), FLOATS), FROM_TARGET: ((config.vocab,), (torch.bool,))}
    ids: dict[str, Promise] = {TO_TARGET: ((config.draft_vocab,), (torch.int64,))}
    (optional if config.draft_vocab == config.vocab else promised).update(ids)
    where = f"head {checkpoint.path}"
    if lacking := [name for name in promised if name not in found]:
        raise UserError(f"{where} lacks {_first(lacking)}, which its config.json calls for: complete it")
    promised |= {name: what for name, what in optional.items() if name in found}
    if extra := [name for name in found if name not in promised]:
        raise UserError(f"{where} holds {_first(extra)}, which a head of its config.json does not have")
    for name, (shape, dtypes) in promised.items():
        if found[name].shape != shape:
            raise UserError(
                f"{where}: {name} has shape {list(found[name].shape)}, but config.json gives {list(shape)}: they do "
                "not belong together"
            )
        if found[name].dtype not in dtypes:
            raise UserError(
                f"{where}: {name} has dtype {_short(found[name].dtype)}, expected {' or '.join(map(_short, dtypes))}"
            )
    return layer


def _target_ids(checkpoint: Checkpoint, config: HeadConfig) -> torch.Tensor:
    """int64 [draft vocabulary + 1]: the model's id of each of the head's, and 0."""
    target_D = torch.arange(config.draft_vocab)
    if TO_TARGET in checkpoint.tensors:
        target_D = target_D + checkpoint.read(TO_TARGET)
    outside = ((target_D < 0) | (target_D >= config.vocab)).nonzero()
    if len(outside):
        draft = int(outside[0])
        raise UserError(
            f"head {checkpoint.path}: {TO_TARGET} gives draft id {draft} the id {int(target_D[draft])}, and the "
            f"model's end at {config.vocab - 1}: take a head that was trained for this model"
        )
    if FROM_TARGET in checkpoint.tensors and not checkpoint.read(FROM_TARGET)[target_D].all():
        raise UserError(f"head {checkpoint.path}: {TO_TARGET} names ids that {FROM_TARGET} does not: download it again")
    return nn.functional.pad(target_D, (0, 1))


def _first(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if names[1:] else "")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
