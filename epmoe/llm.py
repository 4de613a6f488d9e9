"""LLM: the one place that wires ranks, weights, cache and engine; every command and benchmark comes through here.

    with LLM("openai/gpt-oss-20b", experts="auto", runtime={"max_batch": 16}) as llm:
        for answer in llm.generate(["Why is the sky blue?", "And at night?"], SamplingParams(max_new_tokens=64)):
            print(answer.text)

Alone; with `ranks=N` beside N - 1 processes that it starts and that follow its calls (epmoe/ranks/local.py); or under
torchrun: then every rank's script makes the same calls, and every rank gets the same results. A rank whose call differs
is named, and ends the run.

    open     checkpoint → config, tokenizer             before anything large is read
    load     weights → model · cache · engine
    run      prompts → requests → engine → text
"""

import atexit
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, fields, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

from torch import nn

from epmoe.cache.cache import Cache
from epmoe.cache.fit import CacheSettings, fit_cache
from epmoe.config.agreed import agreed
from epmoe.config.compose import from_keys, to_keys
from epmoe.config.schema import LLMConfig, ModelKeys
from epmoe.engine import replicas
from epmoe.engine.config import EngineConfig, resolve_drafts
from epmoe.engine.diagnose import NotFinite
from epmoe.engine.engine import Engine
from epmoe.engine.graphs import resolve_graphs
from epmoe.engine.request import Request, SamplingParams, check, choices
from epmoe.engine.service import Service
from epmoe.errors import UserError
from epmoe.models import Family
from epmoe.models.decoder import DecoderConfig
from epmoe.ranks.control import Control
from epmoe.ranks.local import Followers, as_rank_0, followers, ordered
from epmoe.ranks.memory import told_when_full
from epmoe.ranks.mesh import Ranks, start
from epmoe.server.links import Links
from epmoe.server.replicas import Replicas
from epmoe.text.asked import Conversations, Params, PromptLike, Prompts, conversations, digest, each_of, encoded, listed
from epmoe.text.completion import Choice, Completion, completions
from epmoe.text.defaults import default_params
from epmoe.text.grammar import vocabulary
from epmoe.text.output import Answer
from epmoe.text.prompts import share
from epmoe.text.streamed import streamed
from epmoe.text.tokenizer import Tokenizer, eos_ids
from epmoe.text.variables import Tools, with_tools
from epmoe.weights.attention import attention_of
from epmoe.weights.checkpoint import Checkpoint
from epmoe.weights.choices import DTYPES, Choices
from epmoe.weights.digest import SAME_COPY, contents, expert_samples, held, shared_digests
from epmoe.weights.eagle3 import load_head, open_head
from epmoe.weights.hub import resolve, resolve_draft_model
from epmoe.weights.load import LoadReport, load, model_of
from epmoe.weights.manifest import Manifest
from epmoe.weights.update import NamedTensors, Update, broadcast


def join(config: ModelKeys) -> AbstractContextManager[Ranks]:
    """Join the other ranks as the configuration says; see `epmoe.ranks.mesh.start`."""
    run = config.runtime
    return start(
        device=run.device,
        mesh=(config.mesh.replica, config.mesh.expert),
        timeout_s=run.timeout_s,
        start_timeout_s=run.start_timeout_s,
        threads=run.threads,
        settings=agreed(config),
    )


class LLM:
    """A model that is ready for prompts.

    Args:
        checkpoint: a directory or a Hub id; "": the embedded model.
        ranks: so many on this machine, a GPU each where there are any: this process is the first, and starts the
            others, which follow it and end with it. 1: this one alone, or as the launcher (torchrun) says.
        keys: of the configuration (`python -m epmoe.generate --help` lists them): `experts="triton"`,
            `runtime={"device": "cpu"}`, or a preset's name, `runtime="small"`. `sampling` and `max_new_tokens` hold
            where a prompt's parameters leave them out. `tools` may be a list of objects, too.
    Raises:
        UserError: an unknown key, a value out of range, a checkpoint that is refused, too little memory.
    """

    followers: Followers | None = None  # the ranks that this one has started
    control: Control | None = None  # how a first rank's orders reach its replica, once one serves
    links: Links | None = None  # and how requests reach the other replicas

    def __init__(self, checkpoint: str | Path = "", *, ranks: int = 1, **keys: Any) -> None:
        config = from_keys(with_tools({"checkpoint": str(checkpoint), **keys}))
        with ExitStack() as stack:
            source, launch = None, ExitStack()
            if ranks != 1:
                source = Checkpoint.open(resolve(config.checkpoint))  # a mistake is told before there are others
                self.followers = stack.enter_context(followers(ranks, to_keys(config)))
                launch.enter_context(as_rank_0(self.followers))
            with launch:
                joined = stack.enter_context(join(config))
            self._open(config, joined, source)
            self.load()
            self._stack = stack.pop_all()  # nothing failed: the ranks part at `close`
        atexit.register(self._leave)  # a script that never closes must not look like a rank that was killed

    @classmethod
    def opened(cls, config: ModelKeys, ranks: Ranks, source: Checkpoint | None = None) -> Self:
        """The checkpoint is open and nothing large was read: for commands, which look at their requests before `load`.

        Whoever joined the ranks parts from them. `source` is a checkpoint that is open already.
        """
        made = cls.__new__(cls)
        made._open(config, ranks, source)
        made._stack = ExitStack()
        return made

    def _open(self, config: ModelKeys, ranks: Ranks, source: Checkpoint | None) -> None:
        self.defaults = SamplingParams()  # for what a request leaves out; on rank 0, which alone makes requests
        self.ranks = ranks
        self.source: Checkpoint = source or Checkpoint.open(resolve(config.checkpoint))
        if not isinstance(config, LLMConfig):  # a benchmark's says nothing of answers
            config = LLMConfig(**{item.name: getattr(config, item.name) for item in fields(ModelKeys)})
        elif ranks.is_main:
            self.defaults = default_params(config, self.source)
        self.config = config
        ranks.agree(lambda: {**contents(self.source), **expert_samples(self.source)}, SAME_COPY)
        self.architecture = model_of(self.source)[1]
        drafts = config.draft_model and resolve_draft_model(config.draft_model)
        self.draft = (drafts, open_head(drafts, cast(DecoderConfig, self.architecture))) if drafts else None
        self.model: Family
        self.report: LoadReport
        self.cache: Cache
        self.engine: Engine

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's; raises UserError where it has none."""
        return Tokenizer.of(self.source)

    def load(self, needs: Sequence[int] | None = None) -> None:
        """Read the weights, take memory for the cache, make the engine; a collective.

        Args:
            needs: positions that each request to come can need (`Request.cached`); None: any requests, as many and as
                long as memory allows.
        Raises:
            UserError: see `epmoe.weights.load.load` and `epmoe.cache.fit.fit_cache`.
        """
        config, run = self.config, self.config.runtime
        progress = run.progress and bool(self.source.files)
        attention = attention_of(config.mesh.attention, self.architecture, self.source, self.ranks, run)
        choices = replace(Choices.of(config), attention=attention)
        self.model, self.report = load(self.source, self.ranks, choices, progress=progress)
        self.ranks.agree(lambda: held(self.source, self.model), SAME_COPY, settled=True)  # before the first text
        base, dtype = EngineConfig.of(run, self.ranks.device), DTYPES[self.report.dtype]
        drafter, shape = None, None
        if self.draft:
            place, draft = self.draft
            shape, embedding = (draft.kv_heads, draft.head_dim), self.model.get_submodule("embedding")
            assert isinstance(embedding, nn.Embedding)
            drafter = load_head(place, draft, embedding, self.ranks.device, dtype)
        sizes = run.page, run.max_batch, run.cache_tokens, base.prefill_chunk
        settings = CacheSettings(dtype, *sizes, run.prefix_cache, shape, self.model.own_kv_heads)
        self.cache = fit_cache(self.architecture, needs, self.ranks, settings)
        eos = self.ranks.broadcast_json(eos_ids(self.source))  # rank 0's: not every copy has a generation_config.json
        known = self.source.tokenizer_file
        engine = replace(
            base,
            eos_ids=eos,
            graphs=resolve_graphs(run.graphs, self.ranks, self.report.waits),
            vocabulary=(lambda: vocabulary(self.tokenizer, self.architecture.vocab, eos)) if known else None,
            drafts=resolve_drafts(self.config.speculate, self.architecture, self.ranks, trained=drafter is not None),
            draft_model=drafter,
            attention=attention,
        )
        self.engine = Engine(self.model, self.cache, self.ranks, engine)

    def check(self, requests: Sequence[Request]) -> None:
        """Raises UserError for a prompt that the model cannot take: before minutes of loading, not after."""
        check(requests, self.architecture.vocab, self.architecture.max_positions)

    def prepare(self, requests: Sequence[Request]) -> None:
        """Compile and capture whatever such requests need, now; `generate` does it too. A collective.

        Raises:
            UserError: this LLM has started its ranks, which do it in `generate` and `stream` alone.
        """
        if self.followers is not None:
            raise UserError("prepare is for ranks of a launcher: with ranks=N generate and stream do it")
        replicas.prepare(self.engine, requests)

    def generate(self, prompts: Prompts, params: Params = None) -> list[Completion]:
        """Answer all prompts, several at a time; the answers in their order. A collective.

        Args:
            prompts: one or several. A text goes through the checkpoint's chat template where `chat` says so, as on the
                command line; messages always do; token ids go in as they are. An object has `prompt` or `messages`, and
                what differs for it of the parameters and of the chat template's variables.
            params: for all prompts, or for each. What they leave out is the configuration's `sampling` and
                `max_new_tokens`, else generation_config.json's, else greedy; a seed is drawn for each request, and is
                in the result. With n > 1 a prompt has n answers, in `Completion.outputs`.
        Raises:
            UserError: a prompt or parameters that cannot be; nothing of the call has run then, and the next one may.
            NotFinite: a UserError, too: the model's numbers are none for some prompts. The next call may run.
        """
        return self._answer("generate", prompts, params)

    def chat(self, messages: Conversations, params: Params = None, tools: Tools = None) -> list[Completion]:
        """Answer one conversation or several: `generate` of {"messages": …, "tools": tools}. A collective.

        Args:
            messages: [{"role": "user", "content": "…"}, …], or a list of these.
            params: as `generate`.
            tools: that may be called, as objects for OpenAI; None: the configuration's. A conversation with others is
                an object, for `generate`.
        Raises:
            UserError: as `generate`; the checkpoint's chat template reads no tools.
        """
        return self._answer("chat", conversations(messages, tools), params)

    def _answer(self, call: str, prompts: Prompts, params: Params) -> list[Completion]:
        purpose, make = self._asked(call, prompts, params)
        with ordered(self.followers, call, purpose=purpose):
            return self._complete(self._shared(call, purpose, make))

    def _complete(self, prompts: Sequence[Request]) -> list[Completion]:
        requests, tokenizer = choices(prompts), self.tokenizer
        answers: list[Answer] = []
        try:
            with told_when_full(self.ranks.device):
                results = replicas.generate(
                    self.engine,
                    requests,
                    on_token=lambda index, token: answers[index].feed(token),
                    on_finish=lambda index, result: answers[index].finish(result),
                    on_launch=lambda: answers.extend(Answer(tokenizer, each) for each in requests),
                )
        except NotFinite as error:
            numbers = [number for number, each in enumerate(prompts, 1) for _ in range(each.params.n)]
            raise error.numbered(numbers) from None
        return completions(prompts, [Choice.of(*each) for each in zip(requests, results, answers, strict=True)])

    def stream(self, prompt: PromptLike, params: SamplingParams | None = None) -> Iterator[str]:
        """The answer to one prompt in pieces, as they come; they add up to `Completion.text`. A collective.

        Each replica gives it, so that every rank has the same pieces.

        Closing the iterator, or leaving its loop, ends the request: on every rank after the same piece.

        Raises:
            UserError: as `generate`.
        """
        purpose, make = self._asked("stream", [prompt], params)
        with ordered(self.followers, "stream", purpose=purpose):
            pieces = self._begin(self._shared("stream", purpose, make))
        return pieces if self.followers is None else self.followers.stream(pieces)

    def _begin(self, requests: Sequence[Request]) -> Generator[str]:
        (request,) = requests
        if request.params.n > 1:
            raise UserError(f"n={request.params.n} answers cannot be streamed as one: take n=1, or generate")
        self.engine.prepare_for([request])
        return streamed(self.engine, self.tokenizer, request)

    def update_weights(self, tensors: NamedTensors) -> None:
        """Take other weights, in place, as a trainer has them: all of the model's or some. A collective.

        Args:
            tensors: (name, tensor) pairs, or a mapping, with the checkpoint's names, shapes and dtypes, on any device;
                the same on every rank, each of which takes its experts. MXFP4 experts come as `_blocks` and `_scales`,
                or as plain experts, which are rounded then. All of one call are held until it ends: a large model is
                updated by several calls, a layer each.
        Raises:
            UserError: a name, shape or dtype that is not the model's, what is not finite; nothing has changed then.
        """
        self._check_open("update_weights")
        update = Update.of(Manifest.of(self.source, self.model, self.config.quant), tensors)
        with ordered(self.followers, "update_weights", table=update.table):
            self._update(update.table, update)

    def _update(self, table: Sequence[Any], update: Update | None) -> None:
        """`update` is None for a follower, whom rank 0 sends the tensors of `table`."""
        self.ranks.meet(f"update_weights({digest(table)})")
        self._check_idle("update_weights")
        if update is None or self.followers is not None:
            values = broadcast(table, None if update is None else update.given.values, self.ranks)
            update = update or Update.of(Manifest.of(self.source, self.model, self.config.quant), values)
        self.engine.forget()  # what caches hold comes from the weights before
        with told_when_full(self.ranks.device):
            stayed = update.apply(self.model, self.report, self.ranks)
        if not stayed:
            self.engine.graphs.close()  # the next call captures them anew
        self.ranks.agree(lambda: shared_digests(self.model), "give every rank the same tensors")

    def _check_open(self, call: str) -> None:
        if not hasattr(self, "engine"):
            raise UserError(f"{call} was called after close: make another LLM")

    def _check_idle(self, call: str) -> None:
        if self.engine.busy:
            raise UserError(f"{call} was called within a stream: come to the end of its pieces, or close it, before")

    def _asked(self, call: str, prompts: Prompts, params: Params) -> tuple[str, Callable[[], list[Request]]]:
        """What tells this call from others, the same on every rank, and what makes its requests on rank 0."""
        self._check_open(call)
        given = listed(prompts)
        each = each_of(call, params, len(given))
        asked = [own.over(self.defaults) for own in each]
        purpose = ""
        if self.ranks.size > 1:
            purpose = f"{call}(prompts {digest(given)}, params {digest([asdict(one) for one in each])})"
        return purpose, lambda: encoded(given, asked, self.tokenizer, self.config)

    def _shared(self, call: str, purpose: str, make: Callable[[], list[Request]] = list) -> list[Request]:
        """The same on every rank: what `make` gives on rank 0, once all have come with the same call."""
        self.ranks.meet(purpose)
        self._check_idle(call)
        requests = share(self.ranks, make)
        self.check(requests)
        return requests

    def request(self, prompt: PromptLike, params: SamplingParams | None = None, priority: int = 0) -> Request:
        """What `generate` would ask the engine for this one prompt; on rank 0, from any thread."""
        requests = self._asked("generate", prompt, params)[1]()
        if len(requests) != 1:
            raise UserError(f"these are {len(requests)} prompts: ask for the answer of each alone")
        return replace(requests[0], priority=priority)

    def serve(self, service: Service | Replicas) -> None:
        """Let `service_of` the engine run until rank 0 stops it; a collective. Nothing else may be called meanwhile."""
        self._check_open("serve")
        tokens = service.step_tokens
        with ordered(self.followers, "serve", step_tokens=tokens), told_when_full(self.ranks.device):
            self.ranks.agree(lambda: {"serve.step_tokens": str(tokens)}, "start every rank with the same keys")
            self.control = self.control or Control(self.ranks, self.config.runtime.timeout_s)
            self.links = self.links or Links(self.ranks, self.config.runtime.timeout_s)
            with self.links.attached(service):
                service.run(self.control)

    def close(self) -> None:
        """Give memory back and part from the other ranks; a collective. Nothing can be asked afterwards."""
        atexit.unregister(self._leave)
        if hasattr(self, "engine"):
            if self.followers is not None:
                self.followers.order(call="close")
            self.engine.graphs.close()
            del self.engine, self.model, self.cache
        self._stack.close()

    def _leave(self) -> None:
        """The program ends without `close`; after an exception, the other ranks end with it."""
        error = getattr(sys, "last_value", None)
        self.__exit__(type(error) if error else None, error, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        """With an error, the other ranks end too, and rank 0 tells it."""
        if error is None:
            self.close()
            return None
        atexit.unregister(self._leave)
        return self._stack.__exit__(kind, error, trace)
