"""epmoe: expert-parallel generation from mixture-of-experts models whose experts are stored in MXFP4.

Two passes run through this package; a file is one stop on one of them:

    load   checkpoint → placement → quant (this rank's slice) → experts.pack → model
    step   tokens → attention → router → experts → combine → model → sampler → text
"""

import time

BEGAN = time.perf_counter()  # of a command: all other imports come after, Python's own start some 0.02 s before
__version__ = "0.1.0"
