"""Named steps in a profiler's trace.

attention               a layer's attention, its projections and the norm before them included
route ⊃ dispatch        logits → experts and weights; within it, the gather and scatter index, where that is a
                        step of its own (the Triton router makes both in one kernel for few tokens)
gate_up, down           the experts' two products
combine                 the ranks' slot rows → each token's output
sample                  logits → the next tokens' ids
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.profiler import record_function

NAMES = ("attention", "route", "dispatch", "gate_up", "down", "combine", "sample")
_NOTHING = nullcontext()


def named(name: str) -> AbstractContextManager[Any]:
    """A range of that name in the trace of any torch profiler that runs; otherwise nothing, in 0.3 µs.

    record_function takes 6 µs on the same core even when nobody records: a millisecond in a step of 24 layers.
    """
    assert name in NAMES, name
    return record_function(name) if torch.autograd._profiler_enabled() else _NOTHING
