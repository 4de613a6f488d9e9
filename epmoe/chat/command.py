"""The command: epmoe chat."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from epmoe.chat.local import Local
from epmoe.chat.remote import Remote
from epmoe.chat.screen import Screen
from epmoe.chat.talk import Talk
from epmoe.config.compose import parse
from epmoe.config.schema import ChatConfig
from epmoe.errors import UserError
from epmoe.ranks.launch import Launch


def chat() -> None:
    config = parse(sys.argv[1:], ChatConfig)
    if Launch.read().size > 1:
        raise UserError("epmoe chat is one process: serve the model with torchrun -m epmoe serve, and give base_url=")
    source = Remote(config) if config.base_url else Local(config)
    try:
        with interruptible():
            Talk(source, Screen(), config.system).run()
    finally:
        source.close()


@contextmanager
def interruptible() -> Iterator[None]:
    """In the block Ctrl-C is the conversation's to answer: the guard, which would end the process, does not hear it."""
    heard = signal.set_wakeup_fd(-1)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        signal.set_wakeup_fd(heard, warn_on_full_buffer=False)
