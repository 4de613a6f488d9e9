"""The benchmark of a whole model: `python -m epmoe.bench`, also under torchrun.

    __main__.py   the command: load → engine → decode by batch, prefill → table and one JSON line
    options.py    its keys
    weights.py    random weights of a named size, made on the device
    floor.py      what a step must read, and how fast this machine reads
    peer.py       transformers' model on the same checkpoint

Benchmarks of the parts (experts, router, attention, loading) are in scripts/bench/.
"""
