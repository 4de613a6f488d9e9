"""The command, from a checkpoint to text:

    torchrun --nproc-per-node N -m epmoe.generate checkpoint=DIRECTORY prompt="some text"
    python -m epmoe.generate                       one rank, the embedded model

config → ranks → checkpoint → tokenizer → requests → model → cache → engine (ready) → text
"""

import signal
import sys
import time

if __name__ == "__main__":
    # The imports below take seconds, in which Ctrl-C ends the process without a traceback; then `main` answers it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from epmoe import BEGAN
from epmoe.cache.fit import fit_cache
from epmoe.config import parse
from epmoe.engine.engine import Engine
from epmoe.engine.graphs import choose_graphs
from epmoe.engine.request import check
from epmoe.ranks.command import main
from epmoe.ranks.memory import told_when_full
from epmoe.ranks.mesh import start
from epmoe.ranks.profile import profiled
from epmoe.text.output import Output, check_writable, standard_output, write_lines
from epmoe.text.prompts import get_requests
from epmoe.text.report import closing_line
from epmoe.text.tokenizer import Tokenizer, eos_ids
from epmoe.weights.checkpoint import Checkpoint
from epmoe.weights.hub import resolve
from epmoe.weights.load import DTYPES, load, model_of


def generate() -> None:
    config = parse(sys.argv[1:])
    run = config.runtime
    with start(
        device=run.device,
        expert=config.mesh.expert,
        timeout_s=run.timeout_s,
        start_timeout_s=run.start_timeout_s,
        threads=run.threads,
    ) as ranks:
        if ranks.is_main:
            check_writable(config.output)
        checkpoint = Checkpoint.open(resolve(config.checkpoint))
        tokenizer = Tokenizer.of(checkpoint)
        requests = get_requests(config, tokenizer, ranks)
        _, architecture = model_of(checkpoint)
        check(requests, architecture.vocab, architecture.max_positions)  # before minutes of loading, not after

        model, report = load(
            checkpoint,
            ranks,
            quant=config.quant,
            experts=config.experts,
            router=config.router,
            combine=config.combine,
            placement=config.placement,
            dtype=run.dtype,
            progress=run.progress,
        )
        ranks.meet()  # another node's disk may be slower
        cache = fit_cache(
            model.config,
            [request.cached(model.config.max_positions) for request in requests],
            ranks,
            dtype=DTYPES[report.dtype],
            page=run.page,
            max_batch=run.max_batch,
            cache_tokens=run.cache_tokens,
        )
        engine = Engine(
            model,
            cache,
            ranks,
            # Rank 0's: another node's copy of the checkpoint may have no generation_config.json.
            eos_ids=ranks.broadcast_json(eos_ids(checkpoint)),
            prefill_chunk=run.prefill_chunk,
            max_batch=run.max_batch,
            graphs=choose_graphs(run.graphs, ranks, report),
            timeout_s=run.timeout_s,
            progress=run.progress,
        )
        output = Output(tokenizer, requests, standard_output(ranks))
        with told_when_full(ranks.device):
            engine.prepare(requests)
            ready_s = time.perf_counter() - BEGAN
            with profiled(run.profile, ranks):
                results = engine.generate(requests, output.on_token, output.on_finish)
        line = closing_line(results, ready_s, report.bytes_read, ranks)
        if ranks.is_main:
            if config.output:
                pairs = zip(requests, results, strict=True)
                write_lines(config.output, [output.record(i, *pair) for i, pair in enumerate(pairs)])
            print(line, file=sys.stderr)


if __name__ == "__main__":
    main(generate)
