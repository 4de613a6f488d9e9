"""Synthetic gpt-oss checkpoints of any size, in the exact layout of the published ones, for tests and benchmarks.

Weights are random and well scaled: MXFP4 block bytes uniform, scale bytes 119 or 120, norms 1, embeddings of standard
deviation 1 (so that tokens differ), sinks 1, biases 0.1 (so that dropping one is seen), all other weights 0.02. A
tensor's values depend on the seed, its name and its shape only. Tensors are written one by one from a few threads, so
memory stays bounded at any size (about 0.1 GB a thread).

Letters: E experts · H hidden · I intermediate.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from epmoe.errors import UserError

# A tensor of more values repeats its first PERIOD ones. A prime, so that neither experts nor rows coincide.
PERIOD = 16_777_213


@dataclass(frozen=True)
class Synthetic:
    """Every number of a synthetic checkpoint; the defaults are the tiny size."""

    layers: int = 2
    hidden: int = 96
    intermediate: int = 64
    experts: int = 5
    top_k: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    vocab: int = 320
    window: int = 8
    rope_theta: float = 150000.0
    factor: float = 8.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    original: int = 64  # positions before YaRN
    truncate: bool = False
    max_position: int = 512
    rms_eps: float = 1e-5
    swiglu_limit: float = 7.0
    attention_bias: bool = True
    tied: bool = False  # the vocabulary projection is the embedding
    norm_std: float = 0.0  # norms are 1 ± this
    dtype_experts: str = "mxfp4"  # or bf16: [E, H, 2I] and [E, I, H], as transformers writes them
    rope_spelling: str = "scaling"  # rope_scaling + rope_theta, or `parameters`: rope_parameters
    shards: int = 1
    seed: int = 0


_GPT_OSS = Synthetic(
    layers=24,
    hidden=2880,
    intermediate=2880,
    experts=32,
    top_k=4,
    heads=64,
    kv_heads=8,
    head_dim=64,
    vocab=201088,
    window=128,
    factor=32.0,
    original=4096,
    max_position=131072,
    shards=3,
)
SIZES = {
    "tiny": Synthetic(),
    "20b": _GPT_OSS,
    "120b": replace(_GPT_OSS, layers=36, experts=128, shards=15),
}

_DTYPES = {torch.bfloat16: "BF16", torch.uint8: "U8"}
# harmony's special tokens: those of the published vocabulary at their places, in a small one right after the 256 bytes
_SPECIAL = {
    "<|startoftext|>": 199998,
    "<|endoftext|>": 199999,
    "<|return|>": 200002,
    "<|channel|>": 200005,
    "<|start|>": 200006,
    "<|end|>": 200007,
    "<|message|>": 200008,
    "<|call|>": 200012,
}
LEAST_VOCAB = 256 + len(_SPECIAL)  # that has a tokenizer
_CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|start|>' + message['role'] + '<|message|>' + message['content'] + '<|end|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start|>assistant<|message|>' }}{%- endif %}"
)


def make_checkpoint(directory: str | Path, size: str = "tiny", **overrides: object) -> Path:
    """Write a synthetic checkpoint into `directory` (made when missing) and return its path.

    `overrides` are fields of `Synthetic`. A vocabulary too small for 256 bytes and the special tokens gets no
    tokenizer.

    Raises:
        UserError: MXFP4 experts whose contraction is no multiple of 32, or an unknown spelling.
        TypeError: an override that is no field.
    """
    spec = replace(SIZES[size], **overrides)  # type: ignore[arg-type]
    if spec.dtype_experts not in ("mxfp4", "bf16") or spec.rope_spelling not in ("scaling", "parameters"):
        raise UserError(
            f"dtype_experts={spec.dtype_experts!r} must be mxfp4 or bf16, "
            f"rope_spelling={spec.rope_spelling!r} scaling or parameters"
        )
    if spec.dtype_experts == "mxfp4" and (spec.hidden % 32 or spec.intermediate % 32):
        raise UserError(
            f"hidden={spec.hidden} and intermediate={spec.intermediate} must be multiples of 32 for MXFP4 experts"
        )
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    _write_json(path / "config.json", config_of(spec))
    eos = (
        [_special(spec)[name] for name in ("<|return|>", "<|endoftext|>", "<|call|>")]
        if _has_tokenizer(spec)
        else [spec.vocab - 1]
    )
    _write_json(path / "generation_config.json", {"eos_token_id": eos, "pad_token_id": eos[0]})
    if _has_tokenizer(spec):
        write_tokenizer(path, spec)
    _write_weights(path, spec)
    return path


def config_of(spec: Synthetic) -> dict[str, object]:
    """config.json with the keys of the published gpt-oss checkpoints."""
    eos = _special(spec)["<|return|>"] if _has_tokenizer(spec) else spec.vocab - 1
    rope: dict[str, object] = {
        "beta_fast": spec.beta_fast,
        "beta_slow": spec.beta_slow,
        "factor": spec.factor,
        "original_max_position_embeddings": spec.original,
        "rope_type": "yarn",
        "truncate": spec.truncate,
    }
    config: dict[str, object] = {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": spec.attention_bias,
        "attention_dropout": 0.0,
        "dtype": "bfloat16",
        "eos_token_id": eos,
        "experts_per_token": spec.top_k,
        "head_dim": spec.head_dim,
        "hidden_act": "silu",
        "hidden_size": spec.hidden,
        "initial_context_length": spec.original,
        "initializer_range": 0.02,
        "intermediate_size": spec.intermediate,
        "layer_types": [("sliding_attention", "full_attention")[layer % 2] for layer in range(spec.layers)],
        "max_position_embeddings": spec.max_position,
        "model_type": "gpt_oss",
        "num_attention_heads": spec.heads,
        "num_experts_per_tok": spec.top_k,
        "num_hidden_layers": spec.layers,
        "num_key_value_heads": spec.kv_heads,
        "num_local_experts": spec.experts,
        "output_router_logits": False,
        "pad_token_id": eos,
        "rms_norm_eps": spec.rms_eps,
        "router_aux_loss_coef": 0.9,
        "sliding_window": spec.window,
        "swiglu_limit": spec.swiglu_limit,
        "tie_word_embeddings": spec.tied,
        "use_cache": True,
        "vocab_size": spec.vocab,
    }
    if spec.rope_spelling == "parameters":
        config["rope_parameters"] = {**rope, "rope_theta": spec.rope_theta}
    else:
        config["rope_scaling"], config["rope_theta"] = rope, spec.rope_theta
    if spec.dtype_experts == "mxfp4":
        skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
        config["quantization_config"] = {"modules_to_not_convert": skipped, "quant_method": "mxfp4"}
    return config


@dataclass(frozen=True)
class Drawn:
    """A tensor of a synthetic checkpoint: normal with this mean and deviation, or bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16
    std: float = 0.02
    mean: float = 0.0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def tensors_of(spec: Synthetic) -> Iterator[Drawn]:
    """All tensors of the checkpoint, in the order of the model."""
    hidden, inner, experts = spec.hidden, spec.intermediate, spec.experts
    yield Drawn("model.embed_tokens.weight", (spec.vocab, hidden), std=1.0)
    for layer in range(spec.layers):
        prefix = f"model.layers.{layer}."
        yield Drawn(prefix + "input_layernorm.weight", (hidden,), std=spec.norm_std, mean=1.0)
        for name, rows, columns in (
            ("q_proj", spec.heads * spec.head_dim, hidden),
            ("k_proj", spec.kv_heads * spec.head_dim, hidden),
            ("v_proj", spec.kv_heads * spec.head_dim, hidden),
            ("o_proj", hidden, spec.heads * spec.head_dim),
        ):
            yield Drawn(f"{prefix}self_attn.{name}.weight", (rows, columns))
            if spec.attention_bias:
                yield Drawn(f"{prefix}self_attn.{name}.bias", (rows,), std=0.1)
        yield Drawn(prefix + "self_attn.sinks", (spec.heads,), std=1.0)
        yield Drawn(prefix + "post_attention_layernorm.weight", (hidden,), std=spec.norm_std, mean=1.0)
        yield Drawn(prefix + "mlp.router.weight", (experts, hidden))
        yield Drawn(prefix + "mlp.router.bias", (experts,), std=0.1)
        for name, rows, columns in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
            matrix = f"{prefix}mlp.experts.{name}"
            if spec.dtype_experts == "mxfp4":
                yield Drawn(matrix + "_blocks", (experts, rows, columns // 32, 16), torch.uint8)
                yield Drawn(matrix + "_scales", (experts, rows, columns // 32), torch.uint8)
            else:
                yield Drawn(matrix, (experts, columns, rows))
            yield Drawn(matrix + "_bias", (experts, rows), std=0.1)
    yield Drawn("model.norm.weight", (hidden,), std=spec.norm_std, mean=1.0)
    if not spec.tied:
        yield Drawn("lm_head.weight", (spec.vocab, hidden))


def _draw(tensor: Drawn, seed: int) -> torch.Tensor:
    """The tensor's first PERIOD values, flat."""
    digest = hashlib.sha256(f"{seed} {tensor.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    count = min(math.prod(tensor.shape), PERIOD)
    if tensor.dtype == torch.uint8:
        low, high = (119, 121) if tensor.name.endswith("_scales") else (0, 256)
        return torch.empty(count, dtype=torch.uint8).random_(low, high, generator=generator)
    value = torch.empty(count).normal_(generator=generator)
    return value.mul_(tensor.std).add_(tensor.mean).to(tensor.dtype)


def _write_weights(path: Path, spec: Synthetic) -> None:
    """model.safetensors, or an index and `spec.shards` files of about equal size."""
    for old in path.glob("model*.safetensors*"):
        old.unlink()
    tensors = list(tensors_of(spec))
    total = sum(tensor.nbytes for tensor in tensors)
    files: list[list[Drawn]] = [[] for _ in range(spec.shards)]
    done = 0
    for tensor in tensors:
        files[(2 * done + tensor.nbytes) * spec.shards // (2 * total)].append(tensor)  # where its middle falls
        done += tensor.nbytes
    files = [group for group in files if group]
    names = [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    if len(files) == 1:
        names = ["model.safetensors"]
    else:
        weight_map = {tensor.name: name for name, group in zip(names, files, strict=True) for tensor in group}
        _write_json(
            path / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
    with ThreadPoolExecutor(min(16, len(os.sched_getaffinity(0)))) as pool:
        jobs = [
            pool.submit(_write_tensor, path / name, offset, tensor, spec.seed)
            for name, group in zip(names, files, strict=True)
            for tensor, offset in _write_header(path / name, group)
        ]
        for job in jobs:
            job.result()


def _write_header(file: Path, tensors: list[Drawn]) -> list[tuple[Drawn, int]]:
    """Start a safetensors file; each tensor with its first byte. Wide dtypes come first, so that all are aligned.

    Not by the library, whose `save_file` wants all tensors in memory: 65 GB of 120b, in which PERIOD values repeat.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, offset = [], 0
    for tensor in sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name)):
        span = [offset, offset + tensor.nbytes]
        header[tensor.name] = {"dtype": _DTYPES[tensor.dtype], "shape": tensor.shape, "data_offsets": span}
        starts.append((tensor, offset))
        offset += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(8 + len(text) + offset)
    return [(tensor, 8 + len(text) + at) for tensor, at in starts]


def _write_tensor(file: Path, offset: int, tensor: Drawn, seed: int) -> None:
    data = _draw(tensor, seed).view(torch.uint8).numpy().data
    end = offset + tensor.nbytes
    fd = os.open(file, os.O_WRONLY)
    try:
        begin = offset
        while offset < end:
            at = (offset - begin) % len(data)
            written = os.pwrite(fd, data[at : at + end - offset], offset)
            assert written > 0
            offset += written
    finally:
        os.close(fd)


def _has_tokenizer(spec: Synthetic) -> bool:
    return spec.vocab >= LEAST_VOCAB


def _special(spec: Synthetic) -> dict[str, int]:
    if spec.vocab > max(_SPECIAL.values()):
        return _SPECIAL
    return {name: 256 + i for i, name in enumerate(_SPECIAL)}


def write_tokenizer(path: Path, spec: Synthetic) -> None:
    """Write tokenizer.json and what stands beside it into the directory `path`.

    A byte-level tokenizer: id = byte, then the special tokens; other ids of a large vocabulary stand for no text.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    printable = {
        *range(33, 127),
        *range(161, 173),
        *range(174, 256),
    }  # byte-level BPE writes other bytes as 256, 257, ...
    others = [byte for byte in range(256) if byte not in printable]
    letter = {byte: chr(byte if byte in printable else 256 + others.index(byte)) for byte in range(256)}
    special = _special(spec)
    vocab = {letter[byte]: byte for byte in range(256)} | special
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in special])
    tokenizer.save(str(path / "tokenizer.json"))
    tokens = {"bos_token": "<|startoftext|>", "eos_token": "<|return|>", "pad_token": "<|endoftext|>"}
    _write_json(path / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **tokens})
    (path / "chat_template.jinja").write_text(_CHAT_TEMPLATE)


def _write_json(file: Path, value: object) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n")
