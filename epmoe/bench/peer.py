"""transformers' GptOssForCausalLM as the benchmark's peer: the same checkpoint, the same prompts, the same two lengths.

It runs as its users get it: eager decoding, on an accelerator its MXFP4 kernels where they are installed (otherwise it
turns the experts into bf16 and says so), on the CPU experts in the model's dtype.
"""

import time
from pathlib import Path
from typing import Any

import torch

from epmoe.errors import UserError


def check(ranks: int) -> None:
    """Raises UserError where the peer cannot run, before anything is measured."""
    if ranks > 1:
        raise UserError("compare=transformers runs on one rank: its own expert parallelism is not measured here")
    try:
        from transformers import GptOssForCausalLM  # noqa: F401
    except ImportError as error:
        raise UserError(f"compare=transformers: {error}; install transformers") from error


class Transformers:
    """The model, loaded."""

    def __init__(self, path: Path, quantised: bool, dtype: torch.dtype, device: torch.device) -> None:
        import transformers

        begin = time.perf_counter()
        extra: dict[str, Any] = {"device_map": str(device)} if device.type != "cpu" else {}
        if device.type == "cpu" and quantised:  # there are no MXFP4 kernels for it
            extra["quantization_config"] = transformers.Mxfp4Config(dequantize=True)
        self.model = transformers.GptOssForCausalLM.from_pretrained(path, dtype=dtype, **extra).eval()
        self.device, self.release = device, transformers.__version__
        self.experts = type(self.model.model.layers[0].mlp.experts).__name__  # tells which kernels it found
        self.load_s = time.perf_counter() - begin

    def seconds(self, ids_BP: torch.Tensor, new: int) -> float | None:
        """Seconds until each prompt has `new` tokens, greedy; None when memory runs out."""
        ids_BP = ids_BP.to(self.device)
        begin = time.perf_counter()
        try:
            with torch.inference_mode():
                out = self.model.generate(
                    ids_BP,
                    attention_mask=torch.ones_like(ids_BP),
                    min_new_tokens=new,
                    max_new_tokens=new,
                    do_sample=False,
                    pad_token_id=0,
                )
            assert out.shape[1] == ids_BP.shape[1] + new
            out.tolist()  # waits for the device
        except torch.OutOfMemoryError:
            return None
        return time.perf_counter() - begin
