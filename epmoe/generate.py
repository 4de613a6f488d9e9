"""The command, from a checkpoint to text:

    torchrun --nproc-per-node N -m epmoe.generate checkpoint=DIRECTORY prompt="some text"
    python -m epmoe.generate                       one rank, the embedded model

config → LLM (ranks, checkpoint) → requests → LLM (weights, cache, engine) → text
"""

import signal
import sys
import time

if __name__ == "__main__":
    # The imports below take seconds, in which Ctrl-C ends the process without a traceback; then `main` answers it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from epmoe import BEGAN
from epmoe.config.compose import parse
from epmoe.llm import LLM, join
from epmoe.ranks.command import main
from epmoe.ranks.memory import told_when_full
from epmoe.ranks.profile import profiled
from epmoe.text.inputs import check_output_is_no_input
from epmoe.text.output import Output, check_writable, standard_output, write_lines
from epmoe.text.prompts import get_requests
from epmoe.text.report import closing_line, cut


def generate() -> None:
    config = parse(sys.argv[1:])
    with join(config) as ranks:
        if ranks.is_main:
            check_writable(config.output)
        llm = LLM.opened(config, ranks)
        if ranks.is_main:
            check_output_is_no_input(config, llm.source)
        requests = get_requests(config, llm.tokenizer, ranks)
        llm.check(requests)
        llm.load([request.cached(llm.architecture.max_positions) for request in requests])
        output = Output(llm.tokenizer, requests, standard_output(ranks))
        with told_when_full(ranks.device):
            llm.prepare(requests)
            ready_s = time.perf_counter() - BEGAN
            with profiled(config.runtime.profile, ranks):
                results = llm.engine.generate(requests, output.on_token, output.on_finish)
        line = closing_line(results, ready_s, llm.report.bytes_read, ranks)
        if ranks.is_main:
            if config.output:
                pairs = zip(requests, results, strict=True)
                write_lines(config.output, [output.record(i, *pair) for i, pair in enumerate(pairs)])
            reasons = [answer.finish_reason for answer in output.answers]
            print(line + cut(requests, results, reasons), file=sys.stderr)


if __name__ == "__main__":
    main(generate)
