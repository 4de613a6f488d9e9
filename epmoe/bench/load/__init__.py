"""Requests that come and go, in this process: `python -m epmoe.bench load=…`.

    schedule.py    which conversations come, and when: a function of the keys alone
    callers.py     rank 0's thread: submits what is due, hears each token and each end
    serve.py       the callers beside the loop of epmoe/engine/service.py, which a server runs
    run.py         the command: load → serve → the same lengths through LLM.generate → table and one JSON line

Read them in this order.
"""
