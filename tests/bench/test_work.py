"""What a run needs of the cache."""

from epmoe.bench.options import BenchConfig
from epmoe.bench.work import Work, all_work, most_sequences, positions_needed
from epmoe.config.compose import parse
from epmoe.models.gpt_oss import GptOss
from epmoe.weights.synthetic import SIZES, config_of

CONFIG = ["batches=1,4", "prompt_tokens=10", "lengths=2,20", "prefill=3x50", "first=100", "mixed=4x7", "samples=1"]


def test_the_longest_of_each_place_are_needed() -> None:
    """Every measurement fits, one after the other, and no more is asked for."""
    config = parse(CONFIG, BenchConfig)
    needed = positions_needed(GptOss.Config.from_json(config_of(SIZES["tiny"])), config)
    assert most_sequences(config) == 5 and len(needed) == 5  # 4 decode and one enters
    assert needed[0] == 101 and needed[1:3] == [51, 51]  # first, prefill
    for work in all_work(config):
        assert all(mine <= theirs for mine, theirs in zip(sorted(work.lengths, reverse=True), needed, strict=False))


def test_pages() -> None:
    assert Work((16, 17), "a key").pages(16) == 3


def test_nothing_but_batches() -> None:
    config = parse(["batches=2", "prefill=", "first=", "mixed="], BenchConfig)
    assert [work.key for work in all_work(config)] == ["batches=2"]
