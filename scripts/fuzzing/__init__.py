"""Damaged input for the whole command: what `scripts/fuzz` and tests/whole/test_fuzz.py run.

damage.py    what is done to a checkpoint, a prompts file or a command line, by kind and seed
cases.py     each case in a process of its own, which is watched
judge.py     what came of it: an error line, text that is right, or a fault of ours
requests.py  requests as they come over a connection, damaged, for tests/whole/test_http_fuzz.py
"""
