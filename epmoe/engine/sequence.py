"""A request on its way, and what a step is to do. On the host alone, without tensors."""

from collections.abc import Set
from dataclasses import dataclass, field

from epmoe.engine.drafts import History
from epmoe.engine.matcher import Matcher
from epmoe.engine.request import PromptLogprobs, Request, Result, TokenLogprobs


@dataclass(eq=False)
class Sequence:
    """A request on its way."""

    id: int
    request: Request
    end: int  # length at which it must stop
    added_s: float  # on the engine's clock
    handle: int = -1  # in the cache, once it runs
    prompt: tuple[int, ...] = ()  # what it begins with: the request's ids, and what it had said when it was put back
    cached: int = 0  # tokens of `prompt` that were fed, or found
    found: int | None = None  # of them, those whose pages were there when it began
    keys: list[bytes] = field(default_factory=list)  # of its first pages
    launched: int = 0  # new tokens whose step was launched; of a draft those that have come
    ids: list[int] = field(default_factory=list)  # new tokens that have come
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    scored: int = 0  # tokens of the prompt after each of which the next one's log-probability was launched
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # that have come
    finite: bool = True  # whether all logits are, of which these are made
    first_token_s: float = 0.0  # since it was added
    finished: bool = False
    lane: int = 0  # in which it waits and runs (lanes.py)
    weight: int = 0  # tokens that it counts for there
    stop_ids: Set[int] = frozenset()  # that end it besides the end of text
    matcher: Matcher | None = None  # where it stands in its grammar, once `ids` have come
    history: History | None = None  # likewise, where there are drafts

    def __post_init__(self) -> None:
        self.prompt = self.request.ids

    @property
    def pending(self) -> int:
        """Tokens of the prompt that the model has not seen yet."""
        return len(self.prompt) - self.cached

    @property
    def unscored(self) -> int:
        """How many more of its first tokens are to be scored; the last one's is the first new token's."""
        return 0 if self.request.params.prompt_logprobs is None else len(self.request.ids) - 1 - self.scored

    @property
    def computed(self) -> int:
        """Positions whose keys and values are there, once what was launched is done."""
        return self.cached if self.pending else self.next - 1

    @property
    def decodes(self) -> bool:
        """Whether the next decode step is to have it."""
        return not self.pending and self.next < self.end

    @property
    def next(self) -> int:
        """The position of the next token to be launched, once the prompt was fed."""
        return len(self.request.ids) + self.launched

    @property
    def length(self) -> int:
        """Tokens of prompt and output so far."""
        return len(self.request.ids) + len(self.ids)

    def tokens(self, begin: int, end: int) -> tuple[int, ...]:
        """Those of prompt and output at these positions."""
        own = len(self.request.ids)
        return (*self.request.ids[begin:end], *self.ids[max(begin - own, 0) : max(end - own, 0)])

    def told_of_prompt(self) -> PromptLogprobs:
        """What has come of the log-probabilities of its prompt's tokens, if they are asked for."""
        return () if self.request.params.prompt_logprobs is None else (None, *self.prompt_logprobs)

    def result(self, reason: str, now: float) -> Result:
        times = self.first_token_s, now - self.added_s
        logprobs = tuple(self.logprobs)
        return Result(tuple(self.ids), reason, *times, logprobs, self.found or 0, self.told_of_prompt())


Piece = tuple[Sequence, int]  # of a prompt: how many of its tokens


@dataclass
class Work:
    """What a step is to do."""

    rows: list[Sequence]  # a token of each
    pieces: list[Piece]
    begun: list[Sequence]  # of which the device knows nothing yet
    drafts: dict[Sequence, list[int]] = field(default_factory=dict)  # further tokens of some rows, if those come
    # Whether a draft model goes over the step's tokens, the sequences whose next ones it says, and the last position of
    # each that has a page.
    modelled: bool = False
    told: dict[Sequence, int] = field(default_factory=dict)
