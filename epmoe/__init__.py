"""epmoe: expert-parallel generation from mixture-of-experts models whose experts are stored in MXFP4.

Two passes run through this package; a file is one stop on one of them:

    load   checkpoint → placement → quant (this rank's slice) → experts.pack → model
    step   tokens → attention → router → experts → combine → model → sampler → text
"""

__version__ = "0.1.0"
