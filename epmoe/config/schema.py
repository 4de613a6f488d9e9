"""Every configuration key: its type, default, meaning and range. Nothing else states one of them.

ModelKeys              which model runs, with which parts, on what: what all share
  LLMConfig            LLM(checkpoint, **keys): how it answers, too
    Config             epmoe.generate: the prompts and where answers go, too
    ServeConfig        AsyncLLM(checkpoint, **keys): requests that come and go, too
    ChatConfig           epmoe chat: where the model is, too
  BenchConfig          epmoe.bench: what is measured, too (bench/options.py)
Sampling and Length    also what one request may ask for (engine/request.py)
"""

from dataclasses import dataclass
from typing import ClassVar

from epmoe.config.keys import Biases, ByToken, Names, Numbers, Range, Variables, key
from epmoe.errors import UserError

# vLLM's and OpenAI's → ours; a key that belongs to another, not to a group → its name as a field
SPELLINGS = {"max_tokens": "max_new_tokens", "quant.scale": "quant_scale"}


@dataclass(frozen=True)
class Mesh:
    """The device mesh."""

    replica: int = key(0, "replicas of the model, of mesh.expert ranks each; 0: as many as there are", Range(low=0))
    expert: int = key(0, "ranks that share a layer's experts; 0: all ranks, by mesh.replica", Range(low=0))
    attention: str = key(
        "replicate",
        "each rank runs all, some heads, or its own requests",
        Names(("auto", "replicate", "tensor", "data")),
    )


@dataclass(frozen=True)
class Hub:
    """The community's kernels, for experts=hub."""

    kernel: str = key(
        "kernels-community/gpt-oss-triton-kernels@v1",
        "owner/name@v1, owner/name@COMMIT, or a directory",
    )
    bitwise: bool = key(False, "the same bits in any batch and on any number of ranks, which takes longer")


@dataclass(frozen=True)
class Runtime:
    """What a run may use."""

    device: str = key("auto", "where to run", Names(("auto",), "epmoe.ranks.launch:BACKENDS"))
    dtype: str = key("auto", "of activations and weights outside the experts", Names(("auto", "bfloat16", "float32")))
    threads: int = key(1, "CPU threads of one rank", Range(1, 1024))
    timeout_s: float = key(60.0, "a rank that does not answer for this many seconds is given up", Range(1, 10**6))
    start_timeout_s: float = key(3600.0, "a rank may be ready this many seconds after the first one", Range(1, 10**6))
    page: int = key(16, "positions in one page of the key/value cache", Range(1, 65536))
    prefill_chunk: int = key(0, "most tokens of prompts in one step; 0: 16384, on a CPU 2048", Range(low=0))
    max_batch: int = key(64, "most sequences at a time; with mesh.attention=data on each rank", Range(low=1))
    cache_tokens: int = key(0, "positions in the key/value cache; 0: as many as fit and are needed", Range(low=0))
    prefix_cache: bool = key(True, "find again what requests that began alike have left in the cache")
    graphs: str = key("auto", "decode steps as CUDA graphs; auto: where possible", Names(("auto", "true", "false")))
    progress: bool = key(True, "progress bars on a terminal")
    profile: str = key("", "write a trace of every rank into this directory; graphs=false names its steps")


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; a line of a JSON-lines `prompts` file may set these keys for itself.

    The first five are left out by default: generation_config.json says them then, else `otherwise` (text/defaults.py).
    """

    temperature: float | None = key(
        None, "0: the likeliest token; above: flatter the higher", Range(1e-6, 1e6, or_zero=True), otherwise=0.0
    )
    top_k: int | None = key(None, "draw from the k likeliest tokens; 0: from all", Range(low=0), otherwise=0)
    top_p: float | None = key(
        None, "draw from the smallest set of tokens with this probability", Range(above=0, high=1), otherwise=1.0
    )
    min_p: float | None = key(None, "drop tokens less likely than this times the likeliest", Range(0, 1), otherwise=0.0)
    repetition_penalty: float | None = key(
        None, "above 1: tokens seen before become less likely", Range(1e-6, 1e6), otherwise=1.0
    )
    frequency_penalty: float = key(0.0, "off a token's logit each time that the answer has it already", Range(-2, 2))
    presence_penalty: float = key(0.0, "off a token's logit once the answer has it", Range(-2, 2))
    logit_bias: Biases = key((), "added to logits", ByToken(Range(-100, 100)))
    allowed_token_ids: tuple[int, ...] | None = key(None, "the only ids; left out: all", Numbers(Range(low=0)))
    min_tokens: int = key(0, "neither the end of the text nor stop_token_ids before so many tokens", Range(low=0))
    grammar: str | None = key(None, "what the answer must obey, as text/grammar.py writes it, or in Lark's notation")
    # A command can be run again, so it has a seed without being told; an LLM draws one for each request.
    seed: int | None = key(
        None,
        "same seed, same tokens (combine=slots: on any ranks); left out: 0, in LLM a new one",
        Range(low=0),
        otherwise=0,
    )
    n: int = key(1, "answers for each prompt, each with a seed of its own", Range(1, 1024))
    logprobs: int = key(0, "write log-probabilities of the n likeliest tokens to `output`", Range(0, 100))
    prompt_logprobs: int | None = key(
        None, "those of the prompt's tokens, and of the n likeliest in their places; left out: not", Range(0, 100)
    )
    stop: tuple[str, ...] = key((), "end the answer at this text or special token; again for several, empty for none")
    stop_token_ids: tuple[int, ...] = key((), "end at these token ids", Numbers(Range(low=0), empty=True))
    ignore_eos: bool = key(False, "go on after the end-of-text token")


@dataclass(frozen=True)
class Length:
    """How long an answer may become."""

    max_new_tokens: int | None = key(
        None, "most new tokens; left out: generation_config.json's, else 128", Range(low=1), otherwise=128
    )


@dataclass(frozen=True)
class Serve:
    """What requests that come and go may take."""

    queue_requests: int = key(1024, "most requests that wait for their turn; one more is refused", Range(low=1))
    queue_tokens: int = key(2_000_000, "most tokens of prompts that wait for their turn", Range(low=1))
    step_tokens: int = key(
        0, "most tokens of a step of answers; 0: 384, or more for a large runtime.max_batch", Range(low=0)
    )

    def check(self, max_batch: int) -> None:
        """Raises UserError for steps in which so many answers leave no prompt a place."""
        if 0 < self.step_tokens <= max_batch:
            raise UserError(
                f"serve.step_tokens={self.step_tokens} leaves no prompt a place beside "
                f"runtime.max_batch={max_batch} answers: take more, or a smaller max_batch"
            )


@dataclass(frozen=True)
class Server(Serve):
    """Where requests come from, and what they may take."""

    host: str = key("127.0.0.1", "address to listen at; 0.0.0.0 or ::: all of this machine's")
    port: int = key(8000, "port to listen at; 0: any that is free", Range(0, 65535))
    model: str = key("", "name of the model for clients; empty: the checkpoint's")
    api_key_file: str = key("", "file with the key that clients must send; empty: EPMOE_API_KEY of the environment")
    drain_s: float = key(20.0, "after SIGTERM answers may take so many seconds to their end", Range(0, 120))
    responses: int = key(1000, "most answers of /v1/responses that are kept for a next turn; 0: none", Range(low=0))
    max_body: int = key(8_000_000, "most bytes of a request's body", Range(1, 50_000_000))
    max_bodies: int = key(1_000_000_000, "most bytes of the bodies of all requests that are answered", Range(low=1))
    header_s: float = key(30.0, "most seconds for a request's head, and for its body", Range(above=0, high=3600))
    stalled_s: float = key(
        60.0,
        "a client that takes less than 4 kB in so many seconds, while so much waits, has gone",
        Range(above=0, high=86400),
    )
    log: str = key("", "append a line of JSON for each request to this file, without any of its text")

    def check(self, max_batch: int) -> None:
        """Raises UserError as `Serve`; for a body that never could come."""
        super().check(max_batch)
        if self.max_bodies < self.max_body:
            raise UserError(
                f"serve.max_bodies={self.max_bodies} is less than one body may have, serve.max_body={self.max_body}: "
                "take more, or smaller bodies"
            )


@dataclass(frozen=True)
class ModelKeys:
    """Which model runs, with which parts, on what."""

    subject: ClassVar[str] = "a model"  # what a key of another schema means nothing to
    ignored: ClassVar[tuple[str, ...]] = ()  # keys that mean nothing either, although a group has them
    usage: ClassVar[str] = ""  # what --help says before the keys

    checkpoint: str = key("", "directory or Hub id; empty: the embedded model")
    quant: str = key("auto", "format of the experts in memory", Names(("auto",), "epmoe.formats:FORMATS"))
    quant_scale: str = key("ocp", "quant.scale: how experts are rounded to mxfp4", Names(table="epmoe.formats:SCALES"))
    experts: str = key("auto", "backend of the experts", Names(("auto",), "epmoe.moe.experts:EXPERTS", open=True))
    router: str = key("auto", "backend of the router", Names(("auto",), "epmoe.moe.router:ROUTERS"))
    combine: str = key(
        "auto", "how ranks join their experts' outputs", Names(("auto",), "epmoe.moe.exchange:EXCHANGES")
    )
    placement: str = key(
        "contiguous", "which expert lives on which rank", Names(table="epmoe.moe.placement:PLACEMENTS")
    )
    speculate: str = key("off", "draft next tokens, where they were said before", Names(("off", "ngram", "auto")))
    draft_model: str = key("", "directory or Hub id of a trained head (EAGLE3) that drafts; empty: none")
    mesh: Mesh = key(Mesh(), "how the ranks are arranged")
    hub: Hub = key(Hub(), "the kernels of experts=hub")
    runtime: Runtime = key(Runtime(), "devices, memory and time")

    def check(self) -> None:
        """Raises UserError for keys that exclude each other."""
        if self.draft_model and self.speculate == "off":
            raise UserError(f"draft_model={self.draft_model!r} drafts nothing with speculate=off: take speculate=auto")


@dataclass(frozen=True)
class LLMConfig(Length, ModelKeys):
    """What `LLM(checkpoint, **keys)` takes: how it answers, too."""

    subject: ClassVar[str] = "an LLM"

    system: str | None = key(None, "system message for the chat template; conversations may have their own")
    chat: str = key("auto", "apply the checkpoint's chat template", Names(("auto", "on", "off")))
    reasoning_effort: str | None = key(None, "how much to think, as the chat template spells it: low, medium, high")
    tools: str = key("", "a file with the tools that may be called: a JSON list of objects, as for OpenAI")
    template: Variables = key(
        (), "template.NAME=value: any other variable that the chat template reads, as JSON or text"
    )
    sampling: Sampling = key(
        Sampling(), "how the next token is chosen; left out: generation_config.json's, else greedy"
    )


@dataclass(frozen=True)
class ServeConfig(LLMConfig):
    """What `AsyncLLM(checkpoint, **keys)` takes."""

    subject: ClassVar[str] = "an AsyncLLM"

    serve: Serve = key(Serve(), "requests that come and go")

    def check(self) -> None:
        super().check()
        self.serve.check(self.runtime.max_batch)


@dataclass(frozen=True)
class ServerConfig(ServeConfig):
    """What `epmoe.serve` does."""

    subject: ClassVar[str] = "a server"
    usage: ClassVar[str] = """\
Serve a mixture-of-experts checkpoint, whose experts are shared by all ranks, to clients of OpenAI's interface.

  torchrun --nproc-per-node N -m epmoe.serve key=value ...
  python -m epmoe.serve key=value ...                           on one rank

docs/serving.md says which fields of a request are served."""

    serve: Server = key(Server(), "where requests come from, and what they may take")


@dataclass(frozen=True)
class ChatConfig(LLMConfig):
    """What `epmoe chat` does."""

    subject: ClassVar[str] = "a chat"
    usage: ClassVar[str] = """\
Talk to a model in the terminal.

  epmoe chat key=value ...                                      the model in this process
  epmoe chat base_url=http://localhost:8000/v1 key=value ...    that of a running server

Each line is a message; /help says what else there is. Ctrl-C stops an answer, Ctrl-D ends the conversation."""

    base_url: str = key("", "a server of OpenAI's interface, which has the model; its key: EPMOE_API_KEY")
    model: str = key("", "the model's name at base_url; empty: the first that it lists")

    def check(self) -> None:
        super().check()
        if self.base_url and self.checkpoint:
            raise UserError(f"base_url={self.base_url} and checkpoint={self.checkpoint!r} exclude each other: give one")
        if self.model and not self.base_url:
            raise UserError(f"model={self.model} without base_url=: give checkpoint= for a model in this process")
        if self.sampling.n > 1:
            raise UserError(f"sampling.n={self.sampling.n}: a conversation goes on with one answer: leave it out")


@dataclass(frozen=True)
class Config(LLMConfig):
    """What one run of `epmoe.generate` does."""

    subject: ClassVar[str] = "generation"
    usage: ClassVar[str] = """\
Generate text from a mixture-of-experts checkpoint whose experts are shared by all ranks.

  torchrun --nproc-per-node N -m epmoe.generate key=value ...
  python -m epmoe.generate key=value ...                        on one rank

Generated text goes to standard output, everything else to standard error."""

    prompt: str | None = key(None, "text to continue or to answer")
    prompts: str = key("", "a file is one prompt, so is standard input (-); .jsonl, .ndjson: one a line, as JSON")
    output: str = key("", "write token ids, finish reasons and timings to this .jsonl file")
    resume: bool = key(False, "go on from the answers that an earlier run has left at `output`")

    def check(self) -> None:
        super().check()
        if self.prompt is not None and self.prompts:
            raise UserError(f"prompt and prompts={self.prompts!r} exclude each other: give one of them")
        if self.resume and not self.output:
            raise UserError("resume=true without output=: name the file that is to be gone on with")
