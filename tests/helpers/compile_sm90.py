"""Compile a Triton kernel for a GPU that is not here, and read what it costs: registers and spills.

Triton lowers to PTX on any machine; the `ptxas` in its wheel turns that into machine code and reports the registers and
the bytes of them that it had to spill to memory. A spill in an inner loop is a silent loss of speed, so tests hold
kernels to none. What each compile costs is kept in COMPILED, and conftest.py ends a test run with the table.
"""

import io
import re
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

# The most shared memory that a block may have, in bytes, by generation.
MOST_SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
MOST_TENSOR = 512  # columns
# (kernel and its constants, generation, its cost in words) of every compile of this process that a test has not taken.
COMPILED: list[tuple[str, int, str]] = []


def compile_kernel(
    fn: Any,
    signature: dict[str, str],
    constexprs: dict[str, Any],
    num_warps: int = 4,
    num_stages: int = 3,
    arch: int = 90,
    divisible: Sequence[str] = (),
    registers: int | None = None,
    fusion: bool = True,
    disassemble: bool = False,
) -> dict[str, int]:
    """`{"registers": a thread's, "spills": bytes stored and loaded by spills, "shared": bytes of shared memory,
    "wgmma": Hopper's tensor core instructions in the code, "serialized": the assembler's warnings that these wait for
    each other, "tensor": columns of Blackwell's tensor memory, "factors": pairs of words whose codes become values, and
    "unlike": those of them whose two factors are not one register (words.py), "waits": for the kernel before it,
    and "early": what it does in front of that though others could see it (epmoe/kernels/gpu.py), "loads": how many
    loads stand there, "copies": copies to shared memory but those of words, whose blocks have three dimensions,
    "wide": loads of 16 bytes a thread, and "biased": products whose sum begins with what the kernel
    adds afterwards, which the compiler makes of a product that begins with zero, and which rounds otherwise}`; where
    asked for, `"halves"` too: instructions that multiply pairs of bf16 with one half of a register.

    Args:
        signature: type of each runtime argument, `{"x": "*bf16", "tokens": "i32"}`; pointers are taken as 16-byte
            aligned, as torch allocates them.
        constexprs: value of each `tl.constexpr` argument.
        divisible: integer arguments that are always multiples of 16, which Triton makes use of at a launch.
        registers: a thread's, at most.
        fusion: whether the compiler may make a multiplication and an addition one.
        disassemble: what the assembler has made, which takes a second.
    """
    names = fn.arg_names
    missing = set(names) - set(signature) - set(constexprs)
    assert not missing, f"no type or value for {missing}"
    gluon = isinstance(fn, GluonJITFunction)
    source = (GluonASTSource if gluon else ASTSource)(
        fn=fn,
        signature={name: "constexpr" if name in constexprs else signature[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constexprs.items()},
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if name not in constexprs and (signature[name].startswith("*") or name in divisible)
        },
    )
    options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": registers, "enable_fp_fusion": fusion}
    compiled = _compiled(source, GPUTarget("cuda", arch, 32), options)
    wgmma = compiled.asm["ptx"].count("wgmma.mma_async")
    cost = {**_assembled(compiled.metadata.report), "shared": compiled.metadata.shared, "wgmma": wgmma}
    factors = re.findall(r"/\* factors (%\w+) (%\w+) \*/", compiled.asm["ptx"])
    cost |= {"factors": len(factors), "unlike": sum(one != other for one, other in factors)}
    cost |= {"waits": compiled.asm["ptx"].count("griddepcontrol.wait"), **_early(compiled.asm["ptx"])}
    cost["wide"] = len(re.findall(r"ld\.global\.v4\.b32", compiled.asm["ptx"]))
    cost["biased"] = _biased(compiled.asm.get("ttir", ""))
    cost["tensor"] = getattr(compiled.metadata, "tmem_size", None) or 0
    if disassemble:
        halves = r"H(?:MUL|FMA)2\.BF16\S* .*\bR\d+(?:\.reuse)?\.H([01])_H\1"
        cost["halves"] = len(re.findall(halves, compiled.asm["sass"]))
    pointers = dict.fromkeys(each for name, each in signature.items() if each in ("*bf16", "*fp32") and name in names)
    values = (f"{name}={getattr(value, 'name', value)}" for name, value in constexprs.items())
    what = " ".join([fn.__name__, *list(pointers)[:1], *values, f"warps={num_warps} stages={num_stages}"])
    COMPILED.append((what, arch, "{registers} {spills} {shared}".format(**cost)))
    return cost


def table(compiled: Sequence[tuple[str, int, str]]) -> list[str]:
    """Lines of COMPILED's entries for people: a row for a kernel and its constants, a column for a generation."""
    found: dict[str, dict[int, str]] = {}
    for what, arch, cost in compiled:
        found.setdefault(what, {})[arch] = cost
    archs = sorted({arch for _, arch, _ in compiled})
    head = "".join(f"{f'sm_{arch}':>16}" for arch in archs) + "   kernel and constants"
    rows = ["".join(f"{costs.get(arch, '-'):>16}" for arch in archs) + f"   {what}" for what, costs in found.items()]
    return [head, *sorted(rows, key=lambda row: row[16 * len(archs) :])]


def _biased(ttir: str) -> int:
    made = dict(re.findall(r"(%\w+) = (\S+)", ttir))
    return sum(made.get(begin) == "tt.broadcast" for begin in re.findall(r"= tt\.dot %\w+, %\w+, (%\w+)", ttir))


def _early(ptx: str) -> dict[str, int]:
    """What stands in front of a wait for the kernel before; zeros where nothing waits.

    Stores, calls of the next kernel and loads: in front of the first wait. Copies: in front of any, back to where the
    barriers were made that tell of them.
    """
    before, *others = ptx.split("griddepcontrol.wait")
    if not others:
        return {"early": 0, "loads": 0, "copies": 0}
    started = [part[part.rfind("mbarrier.init") :] for part in (before, *others[:-1]) if "mbarrier.init" in part]
    return {
        "early": len(re.findall(r"\bst\.global|\bred\.|\batom\.|griddepcontrol.launch_dependents", before)),
        "loads": len(re.findall(r"\bld\.global", before)),
        "copies": sum(len(re.findall(r"cp\.async\.(?:c[ag]|bulk\.tensor\.4d)", part)) for part in started),
    }


Stage = Callable[[Any, dict[str, Any]], Any]


def _keep_report(*asked: Any) -> tuple[str, str] | None:
    """Triton's hook: the assembler's report stays with what was compiled, in its cache, too, where it is apart by this.

    Args:
        asked: nothing: for the cache's key; else backend, stages of the compiler by name, options, language, arch.
    """
    if not asked:
        return "keep_report", "keep_report"
    stages: dict[str, Stage] = asked[1]
    assemble = stages["cubin"]

    def reported(ptx: Any, metadata: dict[str, Any]) -> Any:
        with redirect_stdout(io.StringIO()) as said:
            code = assemble(ptx, metadata)
        metadata["report"] = said.getvalue()
        return code

    stages["cubin"] = reported
    return None


def _compiled(source: Any, target: GPUTarget, options: dict[str, Any]) -> Any:
    with knobs.runtime.scope(), knobs.nvidia.scope():
        knobs.runtime.add_stages_inspection_hook, knobs.nvidia.dump_ptxas_log = _keep_report, True
        return triton.compile(source, target=target, options=options)


def _assembled(report: str) -> dict[str, int]:
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", report)]
    assert registers and spills, f"ptxas reported neither registers nor spills:\n{report}"
    return {"registers": max(registers), "spills": sum(spills), "serialized": report.count("are serialized")}
