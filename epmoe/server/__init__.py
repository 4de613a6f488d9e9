"""HTTP in a process of its own beside rank 0, so that none of it holds up the engine's thread.

    rank 0    Service ── tokens of a step ──▶ door.py ══ frames.py, two sockets ══▶ line.py    the HTTP process
              Service.submit, abort ◀──────── door.py ◀════════════════════════════ line.py ◀── app.py ◀── clients

The HTTP process has the tokenizer, the chat template, harmony, stop strings and JSON, and no torch. It is started anew
when it is killed, with the socket that listens: clients that connect meanwhile wait.
"""
