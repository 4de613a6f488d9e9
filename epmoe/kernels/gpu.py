"""What kernels need to know of the GPU, and of each other: its generation, and when one may begin.

A kernel begins when the one before it has ended; then a microsecond passes until its first loads are back. Programmatic
dependent launch (Hopper and newer) lets it come in before that:

    kernel A      next_may_begin() · … results → memory |
    kernel B            reads its weight → registers · after_previous() | next_may_begin() · reads A's results …

A's programs call `next_may_begin`; B is launched with `**early(device)`. Until its `after_previous` returns, a program
of B may read what no kernel writes, or what was there when A's programs called `next_may_begin`, and nothing else, and
write what nobody else reads or writes until then; and each program calls it, or what comes after B would not wait for
A. A kernel after B that is launched without these options waits for B's end as ever. Behind two branches of a graph
(capture.py) B waits for the ends of both. A itself may let B in before it waits (norm.py), if B reads only what no
kernel writes until then: B waits for A's end, and so for all that A waited for.

This gains where B reads much of its own (a product of few rows: linear.py), or where A is small and B's programs
find the machine empty, or where A has more programs than the machine has places: B's come in when A's last ones have
theirs, and fill up what A's tail leaves idle (hopper_kernels.py). It loses where A and B are both as large as the
machine: B's programs take the places that A leaves free just then, three on one multiprocessor and none on the next. So
`down` of few rows and a decode's attention come in late.
"""

# mypy: disallow-untyped-defs=False

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@cache
def generation(device: torch.device) -> int:
    """The first number of a CUDA device's compute capability; 0 for any other device."""
    if device.type != "cuda" or torch.version.cuda is None:
        return 0
    return torch.cuda.get_device_capability(device)[0]


def dependent(device: torch.device) -> bool:
    """Whether the device knows programmatic dependent launch: the constant PDL of kernels that take part."""
    return generation(device) >= 9


def early(device: torch.device) -> dict[str, bool]:
    """Options of a launch whose kernel calls `after_previous`."""
    return {"PDL": True, "launch_pdl": True} if dependent(device) else {"PDL": False}


@triton.jit
def next_may_begin(PDL: tl.constexpr):
    """Let the next kernel's programs come in as soon as all of this one's are here; see above when."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def after_previous(PDL: tl.constexpr):
    """Wait until the kernel before this one has ended and its results can be seen."""
    if PDL:
        gdc_wait()
