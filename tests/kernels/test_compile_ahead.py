"""Kernels compiled ahead are those that launches compile, and a rehearsal launches none; for a GPU that is not here."""

import ast
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import triton
import triton.language as tl
from absent_gpu import DEVICE, absent_gpu, forget, load_model
from spawn import run_ranks
from steps import make_step

from epmoe.cache.cache import Cache
from epmoe.engine.request import Level, SamplingParams
from epmoe.engine.sampler import sample, sampling_tensors
from epmoe.kernels import compile_ahead
from epmoe.kernels.compile_ahead import compiling
from epmoe.kernels.few import few, few_kernel
from epmoe.kernels.product import Tile, product_kernel, tiled
from epmoe.layers.twin import switched
from epmoe.models.decoder import Decoder
from epmoe.ranks.mesh import Ranks
from epmoe.rehearsal import rehearsing, zeroed
from epmoe.weights.synthetic import make_checkpoint

TILES = (Tile(64, 16, 64, 4, 2), Tile(64, 32, 64, 4, 2))
FEW = Tile(16, 8, 64, 1, 3)


def products() -> torch.Tensor:
    """Launch four kernels, one of them in Gluon; two launches take the same."""
    x_TH, weight_NH = torch.randn(5, 64).bfloat16(), torch.randn(32, 64).bfloat16()
    for tile in (*TILES, TILES[0]):
        tiled(x_TH, weight_NH, None, tile)
    tiled(x_TH, weight_NH, torch.randn(32).bfloat16(), TILES[0])
    return few(x_TH, weight_NH, None, FEW)


def kernels_in_memory() -> dict[str, bytes]:
    """Machine code by what the kernel is compiled from."""
    found = [kernel for each in (few_kernel, product_kernel) for kernel in each.device_caches[DEVICE][0].values()]
    return {kernel.hash: kernel.asm["cubin"] for kernel in found}


def test_the_machine_code_of_launches(tmp_path: Path) -> None:
    with absent_gpu(tmp_path / "launched") as gpu:
        products()
        launched = kernels_in_memory()
        assert gpu.launched == ["product_kernel"] * 4 + ["few_kernel"]
    with absent_gpu(tmp_path / "ahead") as gpu:
        with compiling(2) as found:
            with found.named():
                products()
            found.wait(60)
        assert (found.launches, len(found.jobs), len(found.made)) == (5, 4, 4) and not gpu.launched
        assert sorted(gpu.launchers) == ["few_kernel"] + ["product_kernel"] * 3
        assert kernels_in_memory() == launched
        products()
        assert gpu.launched == ["product_kernel"] * 4 + ["few_kernel"]


def test_what_is_compiled_is_not_launched_either(tmp_path: Path) -> None:
    """Kernels in memory, too: a rehearsal's numbers mean nothing, and a kernel might follow them anywhere."""
    with absent_gpu(tmp_path) as gpu:
        products()
        del gpu.launched[:]
        with compiling(2) as found, found.named():
            assert rehearsing() and not products().any(), "what no kernel fills is zero"
        assert (found.launches, len(found.jobs), gpu.launched) == (5, 0, []) and not rehearsing()
        forget()
        with compiling(2) as found:
            with found.named():
                products()
            found.wait(60)
        assert (len(found.jobs), len(found.made)) == (4, 0), "the cache has them"


@triton.jit
def broken_kernel(x_ptr, N: tl.constexpr):
    tl.static_assert(N > 8, "too narrow")
    tl.store(x_ptr + tl.arange(0, N), 0)


def test_an_error_of_the_compiler_comes_with_the_launch(tmp_path: Path) -> None:
    with absent_gpu(tmp_path) as gpu:
        with compiling(2) as found:
            with found.named():
                broken_kernel[(1,)](torch.empty(8), N=8)
                broken_kernel[(1,)](torch.empty(16), N=16)
            found.wait(60)
        with pytest.raises(triton.CompilationError, match="too narrow"):
            broken_kernel[(1,)](torch.empty(8), N=8)
        broken_kernel[(1,)](torch.empty(16), N=16)
        assert gpu.launched == ["broken_kernel"]


@triton.autotune([triton.Config({"N": 8}), triton.Config({"N": 16})], key=[])
@triton.jit
def tuned_kernel(x_ptr, N: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, N), 0)


def test_a_rehearsal_chooses_no_tile(tmp_path: Path) -> None:
    """By times of launches that did not happen."""
    with absent_gpu(tmp_path) as gpu, compiling(1) as found:
        with found.named():
            tuned_kernel[(1,)](torch.empty(16))
        assert not tuned_kernel.cache and not gpu.launched and found.launches == 0


def test_an_error_within_the_rehearsal_goes_through_and_leaves_nothing_behind(tmp_path: Path) -> None:
    with absent_gpu(tmp_path) as gpu:
        with pytest.raises(ZeroDivisionError), compiling(1) as found, found.named():
            products()
            raise ZeroDivisionError
        assert not rehearsing()
        products()
        assert len(gpu.launched) == 5


def test_one_thread_parses_at_a_time_also_beside_what_nobody_waits_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python 3.11 raises a SystemError now and then where two do."""
    parsing, most, parse = [0], [0], ast.parse

    def slowly(*arguments: Any) -> Any:
        parsing[0] += 1
        most[0] = max(most[0], parsing[0])
        time.sleep(0.2)
        parsing[0] -= 1
        return parse(*arguments)

    with absent_gpu(tmp_path):
        with compiling(1):
            pass
        monkeypatch.setattr(triton.runtime.jit.ast, "parse", slowly)
        with ThreadPoolExecutor(2) as threads:
            parsed = [threads.submit(kernel.parse) for kernel in (product_kernel, few_kernel)]
        assert all(isinstance(each.result(), ast.Module) for each in parsed)
    assert most[0] == 1 and parsing[0] == 0


def test_a_compiler_that_does_not_end_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    goes_on = threading.Event()
    monkeypatch.setattr(compile_ahead, "compiled", lambda compile_fn: goes_on.wait(60))
    try:
        with (
            absent_gpu(tmp_path),
            pytest.raises(RuntimeError, match=r"4 kernels did not compile within 0.05 s \(runtime.start_timeout_s\)"),
            compiling(1) as found,
        ):
            with found.named():
                products()
            found.wait(0.05)
    finally:
        goes_on.set()


def on_one_of_two_ranks(ranks: Ranks, cache: str) -> tuple[int, int, int]:
    """Kernels that this rank has named, compiled, and launched afterwards."""
    made: list[int] = []
    real = compile_ahead.Found.keep

    def keep(self: Any) -> None:
        made.extend((len(self.jobs), len(self.made)))
        real(self)

    with absent_gpu(Path(cache)) as gpu, pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(compile_ahead.Found, "keep", keep)
        with compile_ahead.compile_ahead(ranks):
            products()
            row = torch.ones(3)
            work = dist.all_reduce(row, group=ranks.expert_group, async_op=True)
            work.wait()
            assert row.tolist() == [2] * 3 and ranks.stack(row).sum() == 12, "collectives run"
        assert not gpu.launched
        products()
        return made[0], made[1], len(gpu.launched)


def test_ranks_share_the_work(tmp_path: Path) -> None:
    results = run_ranks(on_one_of_two_ranks, 2, str(tmp_path), timeout=120)
    assert [(named, launched) for named, _, launched in results] == [(4, 5)] * 2
    assert sum(made for _, made, _ in results) == 4, "none is compiled twice"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("ahead"), layers=6)


def steps(model: Decoder, cache: Cache) -> None:
    """A step of two prompts, and what follows one of them; ids that are greedy and that are sampled."""
    first, second = (cache.admit(40) for _ in range(2))
    for chunks in ([(first, [1] * 9, 0), (second, [2] * 12, 0)], [(first, [3], 9)]):
        logits_OV = model(make_step(chunks, every=False), cache)
        position_O = torch.arange(len(logits_OV))
        for level in Level:
            params = sampling_tensors([SamplingParams(temperature=1)] * len(logits_OV), logits_OV.device)
            sample(logits_OV, position_O, position_O, params, None, level)
    for handle in (first, second):
        cache.release(handle)


def test_a_model_compiles_nothing_after_its_rehearsal(checkpoint: Path, tmp_path: Path) -> None:
    """Whatever its six layers launch, those few that were rehearsed have named."""
    late: list[str] = []
    with absent_gpu(tmp_path) as gpu, pytest.MonkeyPatch.context() as patch, switched(interpreted=True):
        model, cache = load_model(checkpoint, patch)
        with torch.inference_mode():
            with compiling(2) as found:
                with found.named():
                    steps(model, cache)
                found.wait(120)
            assert [job.future and job.future.exception() for job in found.jobs.values()] == [None] * len(found.jobs)
            assert len(found.made) == len(found.jobs) >= 15 and not gpu.launched
            patch.setattr(triton.knobs.compilation, "listener", lambda **what: late.append(what["src"].name))
            with zeroed():  # for what no kernel fills here
                steps(model, cache)
    assert not late and len(gpu.launched) > 100
