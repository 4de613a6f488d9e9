"""Requests that come and go, in this process: `python -m epmoe.bench load=…`.

    schedule.py    which requests come, and when: a function of the keys alone
    arrivals.py    when the next one is to be added: by rank 0's clock, or when another one has ended
    serve.py       the loop: add, step, note when each token has come
    run.py         the command: load → serve → the same lengths through LLM.generate → table and one JSON line

Read them in this order.
"""
