"""epmoe: expert-parallel generation from mixture-of-experts models whose experts are stored in MXFP4.

Two passes run through this package; a file is one stop on one of them:

    load   hub → checkpoint → manifest → this rank's experts → a backend's layout → model           (weights/)
    step   text → requests → scheduler → a step → embedding → [attention → MoE] per layer → vocabulary → sampler → text

    from epmoe import LLM, AsyncLLM, SamplingParams
"""

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from epmoe.async_llm import AsyncLLM
    from epmoe.engine.request import SamplingParams
    from epmoe.llm import LLM

BEGAN = time.perf_counter()  # of a command: all other imports come after, Python's own start some 0.02 s before
__version__ = "0.1.0"
__all__ = ["LLM", "AsyncLLM", "SamplingParams"]


def __getattr__(name: str) -> Any:
    """What is exported is imported when it is asked for, so that a part of the package comes in without the whole."""
    if name == "LLM":
        from epmoe.llm import LLM

        return LLM
    if name == "AsyncLLM":
        from epmoe.async_llm import AsyncLLM

        return AsyncLLM
    if name == "SamplingParams":
        from epmoe.engine.request import SamplingParams

        return SamplingParams
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
