"""The installed command: epmoe generate | serve | chat | bench; also python -m epmoe, and torchrun … -m epmoe."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from epmoe import __version__, streams
from epmoe.ranks import guard

COMMANDS = {
    "generate": "text from prompts",
    "serve": "a server for OpenAI's clients",
    "chat": "a conversation in the terminal",
    "bench": "benchmarks of a whole model: bench, bench start, bench bits, bench load=…",
}
HELP = """\
Expert-parallel generation from mixture-of-experts models.

{}

epmoe COMMAND --help lists its keys. --key value and --key=value are key=value; a key's underscores may be dashes.
On several devices: torchrun --nproc-per-node N -m epmoe COMMAND key=value ...""".format(
    "\n".join(f"  epmoe {name + ' key=value ...':<30} {about}" for name, about in COMMANDS.items())
)


def run() -> None:
    """Run the command that the command line names, and end the process."""
    streams.open_missing()
    name, rest = (sys.argv[1], sys.argv[2:]) if sys.argv[1:] else ("", [])
    if name in ("--help", "-h", "--version"):
        _end(__version__ if name == "--version" else HELP)
    if name not in COMMANDS:
        wrong = f"{name!r} is no command" if name else "no command"
        _end(f"epmoe: error: {wrong}: give one of {', '.join(COMMANDS)} (epmoe --help explains them)", 2)
    guard.begin()  # the imports below take seconds
    from epmoe.ranks.command import main

    def body() -> None:
        command = _command(name, rest)
        command()

    main(body)


def _command(name: str, argv: Sequence[str]) -> Callable[[], None]:
    """The command, which reads its words from sys.argv.

    Raises:
        UserError: an option without a value.
    """
    from epmoe.bench.options import BenchConfig, LoadConfig, StartConfig
    from epmoe.config.schema import ChatConfig, Config, ServerConfig
    from epmoe.config.words import words

    schemas: dict[str, list[type]] = {"generate": [Config], "serve": [ServerConfig], "chat": [ChatConfig]}
    found = words(argv, schemas.get(name, [BenchConfig, LoadConfig, StartConfig]))
    sys.argv = [f"epmoe {name}", *found]
    if name == "generate":
        from epmoe.generate import generate

        return generate
    if name == "serve":
        from epmoe.serve import serve

        return serve
    if name == "chat":
        from epmoe.chat.command import chat

        return chat
    from epmoe.bench.__main__ import chosen

    return chosen(found)


def _end(text: str, code: int = 0) -> NoReturn:
    """Say it on rank 0."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr if code else sys.stdout, flush=True)
    sys.exit(code)


if __name__ == "__main__":
    run()
