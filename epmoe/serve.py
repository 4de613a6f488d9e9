"""The command, from a checkpoint to HTTP:

    torchrun --nproc-per-node N -m epmoe.serve checkpoint=DIRECTORY serve.port=8000
    python -m epmoe.serve                          one rank, the embedded model

config → door (the HTTP process of rank 0) → LLM (weights, cache, engine) → service, until a signal comes
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from epmoe import streams
from epmoe.ranks import guard

if __name__ == "__main__":
    # The imports below take seconds, in which Ctrl-C ends the process without a traceback; then `main` answers it.
    streams.open_missing()  # before they open a file, which would get a closed stream's number
    guard.begin()

from dataclasses import asdict
from functools import partial

from epmoe import BEGAN, __version__
from epmoe.config.compose import parse
from epmoe.config.schema import ServerConfig
from epmoe.engine.call import Serving
from epmoe.errors import UserError, warn
from epmoe.llm import LLM, join
from epmoe.ranks.command import main
from epmoe.ranks.drain import drained
from epmoe.ranks.ending import leave
from epmoe.server.door import Door, listen
from epmoe.server.frames import Hello, Ready
from epmoe.server.replicas import service_of
from epmoe.text.chat_files import chat_sources, special_tokens
from epmoe.text.variables import configured
from epmoe.weights.digest import fingerprint

LOOK_S = 0.5  # how often a wait for the service looks whether it still may come
KEY = "EPMOE_API_KEY"  # of the environment


def serve() -> None:
    config = parse(sys.argv[1:], ServerConfig)
    with join(config) as ranks, drained(ranks.watch, end) as drain:
        keys = api_key(config) if ranks.is_main else ""
        listener = listen(config.serve.host, config.serve.port) if ranks.is_main else None
        llm = LLM.opened(config, ranks)
        door = None if listener is None else Door(hello(llm, config, keys), listener)
        ranks.meet()  # the tokenizer may be large
        llm.load()
        service = service_of(llm.engine, config.serve)
        seconds = config.serve.drain_s
        if door is None:
            on_a_thread(lambda: running(service, partial(drain.ready, seconds, lambda: None)))
            llm.serve(service)
            return
        assert listener is not None
        door.check()
        host, port = listener.getsockname()[:2]
        where = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
        ready = partial(drain.ready, seconds, lambda: door.drain(seconds))
        on_a_thread(lambda: open_when_ready(door, service, llm, where, ready))
        llm.serve(service)
        door.close()
        door.check()


def end(number: int) -> None:
    """A signal ends a rank alone at once: it is not ready, or what is in flight comes to its end already."""
    guard.told()
    streams.tell_raw(f"epmoe: {guard.SIGNALS[signal.Signals(number)]}\n")
    leave(0)


def on_a_thread(work: Callable[[], object]) -> None:
    threading.Thread(target=work, name="epmoe-ready", daemon=True).start()


def running(service: Serving, ready: Callable[[], object]) -> bool:
    """Wait until the loop takes turns, and call `ready` then; False: it never will."""
    while not service.is_running(LOOK_S):
        if service.failure is not None:
            return False
    ready()
    return True


def open_when_ready(door: Door, service: Serving, llm: LLM, where: str, ready: Callable[[], object]) -> None:
    """Let requests in once the loop takes turns; the line that says so. `ready`: signals only ask from then on."""
    made = f"{fingerprint(llm.source, llm.model)}-{__version__}"
    if running(service, ready):
        door.open(service, Ready(made, llm.cache.pages.room))
        streams.tell(f"epmoe: {door.hello.model} at {where}, ready in {time.perf_counter() - BEGAN:.1f} s")


def hello(llm: LLM, config: ServerConfig, key: str) -> Hello:
    """What the HTTP process needs to know.

    Raises:
        UserError: the checkpoint has no tokenizer, a bad chat template, or a file of tools that is none.
    """
    source = llm.source
    if source.tokenizer_file is None:
        raise UserError(f"checkpoint {source.path} has no tokenizer.json: download it beside the weights")
    name = config.checkpoint if config.checkpoint else "epmoe-demo"
    own = config.mesh.attention in ("data", "auto")  # each rank may have requests of its own, so many at a time
    parts = llm.ranks.size if own else llm.ranks.replicas
    return Hello(
        model=config.serve.model or (Path(name).resolve().name if os.path.isdir(name) else name),
        release=__version__,
        created=int(time.time()),
        vocab=llm.architecture.vocab,
        max_positions=llm.architecture.max_positions,
        tokenizer_file=str(source.tokenizer_file),
        templates={} if config.chat == "off" else chat_sources(source),
        special=special_tokens(source),
        chat=config.chat,
        system=config.system,
        variables=configured(config),
        defaults=asdict(llm.defaults),
        most_requests=config.serve.queue_requests + parts * config.runtime.max_batch,
        queue_requests=config.serve.queue_requests,
        max_body=config.serve.max_body,
        max_bodies=config.serve.max_bodies,
        header_s=config.serve.header_s,
        stalled_s=config.serve.stalled_s,
        api_key=key,
        log=os.path.abspath(os.path.expanduser(config.serve.log)) if config.serve.log else "",
        responses=config.serve.responses,
    )


def api_key(config: ServerConfig) -> str:
    """The key that clients must send; "": none. Without one, and not on this machine alone, a line says so.

    Raises:
        UserError: the file cannot be read, or the key cannot stand in a header.
    """
    found, origin = os.environ.get(KEY, ""), KEY
    if config.serve.api_key_file:
        origin = f"serve.api_key_file={config.serve.api_key_file}"
        try:
            found = Path(os.path.expanduser(config.serve.api_key_file)).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{origin} cannot be read ({error}): give a file with the key alone") from error
        if not found:
            raise UserError(f"{origin} is empty: give a file with the key alone")
    if not (found.isascii() and found.isprintable()) or " " in found:
        raise UserError(f"{origin} is no key: take letters, digits and signs of ASCII, without spaces")
    if not found and config.serve.host not in ("127.0.0.1", "::1", "localhost"):
        warn(f"serve.host={config.serve.host} without serve.api_key_file: whoever reaches this port may ask")
    return found


if __name__ == "__main__":
    main(serve)
