"""Report: the closing line's numbers are those of the run."""

import re

import pytest
import torch

from epmoe.engine.request import Request, Result, SamplingParams
from epmoe.ranks.mesh import Ranks
from epmoe.text.report import closing_line, cut

NUMBERS = re.compile(
    r"epmoe: 5 tokens in 0\.50 s, 10\.0 tokens/s, first token after 0\.100 s \(3\.10 s from the start\); "
    r"1 rank, read 1,234\.5 MB and used [\d,]+\.\d MB of memory at the peak"
)


def test_one_rank() -> None:
    """Tokens of all requests, in the time of the last to end; the first token of any."""
    results = [Result((1, 2, 3), "length", 0.2, 0.5, ()), Result((4, 5), "eos", 0.1, 0.4, ())]
    assert NUMBERS.fullmatch(closing_line(results, 3.0, 1_234_500_000, Ranks(0, 1, 0, 1, torch.device("cpu"))))


def test_no_answers() -> None:
    """Of requests for their prompts' log-probabilities alone."""
    none, one = Result((), "length", 0.0, 0.5, ()), Result((1, 2, 3, 4, 5), "length", 0.1, 0.4, ())
    line = closing_line([none], 3.0, 1_000_000, Ranks(0, 1, 0, 1, torch.device("cpu")))
    assert line.startswith("epmoe: 0 tokens in 0.50 s, 0.0 tokens/s, 1 rank, read 1.0 MB")
    assert NUMBERS.fullmatch(closing_line([none, one], 3.0, 1_234_500_000, Ranks(0, 1, 0, 1, torch.device("cpu"))))
    asked = Request((1, 2), SamplingParams(max_new_tokens=0, prompt_logprobs=0))
    assert cut([asked], [none], ["length"]) == ""


@pytest.mark.parametrize(
    ("values", "says"), [((2_000_000, 2_000_000), "read 2.0 MB"), ((3_000_000, 1_000_000), "read 1.0 to 3.0 MB")]
)
def test_several_ranks(values: tuple[int, int], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ranks, "gather", lambda self, mine: [[value, 1_000_000] for value in values])
    line = closing_line([Result((1,), "stop", 0.1, 0.1, ())], 0.0, 0, Ranks(0, 2, 0, 1, torch.device("cpu")))
    assert f"2 ranks, each {says}" in line and line.endswith("and used 1.0 MB of memory at the peak")


CUT = {  # (tokens made, most of them, finish reason) of each answer → what is said
    ((3, 3, "length"),): "; the answer was cut by max_new_tokens=3",
    ((3, 3, "eos"),): "",
    ((3, 3, "stop"), (1, 3, "eos")): "",
    ((3, 3, "length"), (3, 3, "length")): "; all 2 answers were cut by max_new_tokens=3",
    ((3, 3, "length"), (2, 3, "eos"), (1, 3, "stop")): "; 1 of 3 answers was cut by max_new_tokens=3",
    ((3, 3, "length"), (4, 4, "length"), (1, 9, "eos")): "; 2 of 3 answers were cut by max_new_tokens",
    ((2, 3, "length"),): "; the answer was cut at the last of the model's positions",
    ((2, 9, "length"), (3, 3, "length"), (1, 3, "eos")): (
        "; 1 of 3 answers was cut by max_new_tokens=3; 1 of 3 answers was cut at the last of the model's positions"
    ),
}


@pytest.mark.parametrize("answers", CUT)
def test_answers_that_were_cut(answers: tuple[tuple[int, int, str], ...]) -> None:
    requests = [Request((1,), SamplingParams(max_new_tokens=most)) for _, most, _ in answers]
    results = [Result((7,) * made, "length", 0.1, 0.2, ()) for made, _, _ in answers]
    assert cut(requests, results, [reason for *_, reason in answers]) == CUT[answers]
