"""The benchmarks of a whole model: `python -m epmoe.bench`, also under torchrun.

    __main__.py     which of them
    options.py      their keys
    conditions.py   which model, and what a reader must know to compare

    model.py        load → engine → what follows → tables and one JSON line
      decode.py     a decode step by batch, and prefill
      first.py      the first token by prompt length
      mixed.py      a prompt that enters while others decode
      work.py       how much of the cache all of it needs
      floor.py      what a step must read, and how fast this machine reads
      peer.py       transformers' model on the same checkpoint
      table.py      the tables
    load/           requests that come and go: load=poisson, load=concurrent
    start.py        a cold and a warm start
    bits.py         the same bits in any company

    weights.py      random weights of a named size, made on the device
    lengths.py      distributions of lengths, as a key spells them

Benchmarks of the parts (experts, router, attention, loading) are in scripts/bench/.
"""
