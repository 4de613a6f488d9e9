"""What a run measures at a time, and the positions of the cache that it needs."""

from dataclasses import dataclass
from itertools import zip_longest

from epmoe.bench.mixed import decoded_tokens
from epmoe.bench.options import BenchConfig
from epmoe.cache.cache import Cache
from epmoe.errors import UserError
from epmoe.models import ModelConfig


@dataclass(frozen=True)
class Work:
    """Sequences that run at a time, and the key that asks for them."""

    lengths: tuple[int, ...]  # of each, in positions
    key: str

    @classmethod
    def of(cls, sequences: int, length: int, key: str) -> "Work":
        return cls((length,) * sequences, key)

    def pages(self, page: int) -> int:
        """Pages of the cache, of so many positions each."""
        return sum(-(-length // page) for length in self.lengths)


def all_work(config: BenchConfig) -> list[Work]:
    """All that the run measures."""
    decode = config.prompt_tokens + config.lengths[1]
    work = [Work.of(size, decode, f"batches={size}") for size in config.batches]
    work += [Work.of(1, tokens + 1, f"first={tokens}") for tokens in config.first]
    if config.prefill:
        sequences, tokens = config.prefill
        work.append(Work.of(sequences, tokens + 1, f"prefill={sequences}x{tokens}"))
    if config.mixed:
        sequences, tokens = config.mixed
        decoding = config.prompt_tokens + decoded_tokens(tokens, config.samples)
        work.append(Work((*[decoding] * sequences, tokens + 1), f"mixed={sequences}x{tokens}"))
    return work


def most_sequences(config: BenchConfig) -> int:
    """Of all that is measured: what runtime.max_batch is to a benchmark."""
    return max(len(work.lengths) for work in all_work(config))


def positions_needed(model: ModelConfig, config: BenchConfig) -> list[int]:
    """Lengths of sequences for which a cache has room for all that is measured, one after the other.

    Raises:
        UserError: a prompt and its new tokens exceed the model's positions.
    """
    for work in all_work(config):
        if max(work.lengths) > model.max_positions:
            raise UserError(
                f"{work.key} needs {max(work.lengths)} positions for a prompt and its new tokens, and the model has "
                f"{model.max_positions}: lower prompt_tokens, lengths, prefill, first, mixed or samples"
            )
    longest_first = (sorted(work.lengths, reverse=True) for work in all_work(config))
    return [max(lengths) for lengths in zip_longest(*longest_first, fillvalue=1)]


def check_cache(cache: Cache, config: BenchConfig) -> None:
    """Raises UserError for a cache in which not all sequences of a batch run together."""
    largest = max(all_work(config), key=lambda work: work.pages(config.runtime.page))
    if cache.tokens < sum(largest.lengths):
        raise UserError(
            f"{largest.key} needs {sum(largest.lengths)} positions of the key/value cache, and {cache.tokens} fit: "
            "lower it, or raise runtime.cache_tokens where that was set"
        )
