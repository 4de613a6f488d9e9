"""A trained model → a checkpoint directory in the published layout of gpt-oss."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from epmoe.formats.mxfp4 import decode, encode
from scripts.train.data import save_tokenizer, special_ids
from scripts.train.model import Shape

PACKED = ("experts.gate_up_proj", "experts.down_proj")


def stored_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state_dict` → the checkpoint's tensors: experts as `_blocks` and `_scales`, all else in bfloat16."""
    tensors = {}
    for name, value in state.items():
        if name.endswith(PACKED):
            blocks, scales = encode(value.float())
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks.cpu(), scales.cpu()
        else:
            tensors[name] = value.to(torch.bfloat16).cpu().contiguous()
    return tensors


def as_stored(state: dict[str, Tensor], experts: str) -> dict[str, Tensor]:
    """The float32 values that a reader of the checkpoint sees, experts in `mxfp4` or, for comparison, in `bf16`."""
    return {
        name: decode(*encode(value.float()), torch.float32)
        if experts == "mxfp4" and name.endswith(PACKED)
        else value.to(torch.bfloat16).float()
        for name, value in state.items()
    }


def save(directory: Path, state: dict[str, Tensor], shape: Shape, tokenizer: Tokenizer) -> int:
    """Write the checkpoint (all but training.json). Returns the directory's bytes."""
    directory.mkdir(parents=True, exist_ok=True)
    start, end = special_ids(tokenizer)
    generation = {"bos_token_id": start, "eos_token_id": [end], "pad_token_id": end}
    for name, content in {"config.json": shape.config(end), "generation_config.json": generation}.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")
    save_tokenizer(tokenizer, directory)
    written = directory / "model.safetensors.part"  # renamed when whole: a cut run leaves the one before
    save_file(stored_tensors(state), written, metadata={"format": "pt"})
    written.chmod(0o644)
    written.replace(directory / "model.safetensors")
    return sum(file.stat().st_size for file in directory.iterdir())
