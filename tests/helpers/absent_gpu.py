"""A GPU that is not here, as Triton sees it: kernels are compiled from tensors on the CPU, and a launch does nothing.

    with absent_gpu(folder) as gpu:
        tiled(x, weight, ...)

compiles product_kernel, and `gpu.launched` names it then. No result means anything.
"""

import gc
import os
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from loading import load_rank
from triton.backends.compiler import GPUTarget

from epmoe import kernels
from epmoe.cache.cache import Cache, CacheConfig
from epmoe.models.decoder import Decoder
from epmoe.moe.experts import triton as experts
from epmoe.moe.router import triton as router

HOPPER = GPUTarget("cuda", 90, 32)
DEVICE = 1000  # a number that no real device has: a kernel is kept in memory by its device's


class AbsentGpu:
    """What Triton asks of a driver."""

    def __init__(self, target: GPUTarget = HOPPER) -> None:
        self.target = target
        self.launched: list[str] = []
        self.launchers: list[str] = []  # kernels whose launcher was made
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 232448}, load_binary=self._load
        )

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return DEVICE

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        self.launchers.append(metadata.name)
        return lambda *args: self.launched.append(metadata.name)

    def _load(self, name: str, *_: Any) -> tuple[int, int, int, int, int]:
        return 0, 0, 0, 0, 1024


@contextmanager
def absent_gpu(cache: Path, target: GPUTarget = HOPPER) -> Iterator[AbsentGpu]:
    """It is there within the block, with `cache` as Triton's folder and nothing in memory."""
    gpu = AbsentGpu(target)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "TRITON_CACHE_DIR", str(cache))
        patch.setattr(triton.runtime.driver, "_active", gpu)
        try:
            yield gpu
        finally:
            forget()


def forget(device: int = DEVICE) -> None:
    """What was compiled for it, or for a real device, is no longer in memory."""
    for each in gc.get_objects():
        if issubclass(type(each), triton.JITFunction):
            each.device_caches.pop(device, None)


def load_model(checkpoint: Path, patch: pytest.MonkeyPatch) -> tuple[Decoder, Cache]:
    """A model with the kernels of a GPU, to be called where one is absent and twins are switched to the interpreter's;
    and a cache for four sequences."""
    for package in (kernels, experts, router):  # a kernel that comes in later would be the interpreter's
        for each in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            import_module(each.name)
    patch.setattr(triton.knobs.runtime, "interpret", True)  # experts and router let a CPU through then
    model, _ = load_rank(checkpoint, experts="triton", router="triton", dtype="float32", progress=False)
    config = model.config
    shape = (config.windows, config.kv_heads, config.head_dim)
    return model, Cache(CacheConfig(*shape, tokens=600, sequences=4, dtype=torch.float32), "cpu")
