"""The command, from a checkpoint to text:

    torchrun --nproc-per-node N -m epmoe.generate checkpoint=DIRECTORY prompt="some text"
    python -m epmoe.generate                       one rank, the embedded model

config → LLM (ranks, checkpoint) → requests → LLM (weights, cache, engine) → text
"""

import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext

from epmoe import streams
from epmoe.ranks import guard

if __name__ == "__main__":
    # The imports below take seconds, in which Ctrl-C ends the process without a traceback; then `main` answers it.
    streams.open_missing()  # before they open a file, which would get a closed stream's number
    guard.begin()

from epmoe import BEGAN
from epmoe.config.compose import parse
from epmoe.config.schema import Config
from epmoe.engine import replicas
from epmoe.engine.diagnose import NotFinite
from epmoe.engine.request import Request, choices
from epmoe.llm import LLM, join
from epmoe.ranks.command import main
from epmoe.ranks.memory import told_when_full
from epmoe.ranks.profile import profiled
from epmoe.text.answers import Answers, opened
from epmoe.text.inputs import check_output_is_no_input
from epmoe.text.output import Output, standard_output
from epmoe.text.prompts import get_requests
from epmoe.text.report import closing_line, cut


def generate() -> None:
    config = parse(sys.argv[1:])
    with join(config) as ranks:
        writes = ranks.is_main and config.output
        with opened(config.output, resume=config.resume) if writes else nullcontext() as answers:
            llm = LLM.opened(config, ranks)
            if ranks.is_main:
                check_output_is_no_input(config, llm.source)
            prompts = get_requests(config, llm.tokenizer, ranks, llm.defaults)
            llm.check(prompts)
            requests = choices(prompts)
            numbers = [number for number, each in enumerate(prompts, 1) for _ in range(each.params.n)]
            rest = remaining(llm, requests, answers, config)
            failed, line = None, f"epmoe: output={config.output} has every answer already"
            try:
                if rest:
                    line = answer(llm, [requests[index] for index in rest], answers, config)
            except NotFinite as error:  # all others are answered
                failed = error.numbered([numbers[index] for index in rest])
            if answers is not None and (answers.good or failed is None):
                answers.finish()
            ranks.meet()  # the file may be long
            if failed is not None:
                raise failed
            if ranks.is_main:
                streams.tell(line)


def remaining(llm: LLM, requests: Sequence[Request], answers: Answers | None, config: Config) -> list[int]:
    """The requests that no earlier run has answered, by index: rank 0's, which alone reads the file; a collective."""
    mine = list(range(len(requests)))
    if answers is not None:
        mine = answers.remaining(requests, llm.source.config)
    if not config.resume:
        return mine
    llm.ranks.meet()  # the file may be long
    shared: list[int] = llm.ranks.broadcast_json(mine)
    return shared


def answer(llm: LLM, requests: Sequence[Request], answers: Answers | None, config: Config) -> str:
    """Answer the requests that remain; the closing line. A collective.

    Raises:
        NotFinite: logits of some are not finite; all others are answered.
    """
    ranks = llm.ranks
    llm.load([request.cached(llm.architecture.max_positions) for request in requests])
    keep = None if answers is None else answers.add
    output = Output(llm.tokenizer, requests, standard_output(ranks), keep)
    with told_when_full(ranks.device):
        llm.prepare(requests)
        ready_s = time.perf_counter() - BEGAN
        with profiled(config.runtime.profile, ranks):
            results = replicas.generate(llm.engine, requests, output.on_token, output.on_finish)
    before = len(answers.good) - len(requests) if answers is not None else 0
    reasons = [each.finish_reason for each in output.answers]
    line = closing_line(results, ready_s, llm.report.bytes_read, ranks, before=before)
    return line + cut(requests, results, reasons)


if __name__ == "__main__":
    main(generate)
