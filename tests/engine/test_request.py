"""What a request asks for: values that are left out, spellings, seeds of several answers."""

from dataclasses import replace
from typing import Any

import pytest

from epmoe.engine.request import Request, SamplingParams, Workload, choice_seed, choices
from epmoe.errors import UserError

GREEDY = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}


def test_what_is_left_out_is_greedy_at_last() -> None:
    settled = vars(SamplingParams().settled())
    assert {name: settled[name] for name in GREEDY} == GREEDY
    assert (settled["seed"], settled["max_new_tokens"], settled["n"]) == (0, 128, 1)
    assert Request((1,), SamplingParams(top_k=3)).params == SamplingParams(top_k=3).settled()


def test_what_is_given_wins_over_what_it_is_laid_on() -> None:
    base = SamplingParams(temperature=0.5, top_k=7, stop=("x",), n=2)
    laid = SamplingParams(temperature=0.0, max_new_tokens=3).over(base)
    assert laid == SamplingParams(temperature=0.0, top_k=7, max_new_tokens=3)
    assert SamplingParams(seed=0).over(SamplingParams(seed=5)).seed == 0


def test_max_tokens_is_max_new_tokens() -> None:
    assert (
        SamplingParams(max_tokens=5)
        == SamplingParams(max_new_tokens=5)
        == SamplingParams(max_tokens=5, max_new_tokens=5)
    )
    assert replace(SamplingParams(max_tokens=5), top_k=1).max_new_tokens == 5
    with pytest.raises(UserError, match=r"^max_tokens=5 and max_new_tokens=6 are one key in two spellings"):
        SamplingParams(max_tokens=5, max_new_tokens=6)
    wrong: Any
    for wrong in (0, "5", 1.5):
        with pytest.raises(UserError, match=r"^max_new_tokens="):
            SamplingParams(max_tokens=wrong)


def test_seeds_of_choices_do_not_collide() -> None:
    """Not among neighbouring seeds, where seed + choice would, nor with the seeds themselves; they fit in JSON."""
    seeds = [*range(300), 2**53 - 1, 2**63 - 1]
    found = [choice_seed(seed, choice) for seed in seeds for choice in range(40)]
    assert len(set(found)) == len(found)
    assert all(choice_seed(seed, 0) == seed for seed in seeds)
    assert all(0 <= choice_seed(seed, 1) < 2**53 for seed in seeds)
    assert choice_seed(1, 2) == 8250782252887773  # what was drawn once can be drawn again, in any release
    ones = sum(bin(choice_seed(seed, 1) ^ choice_seed(seed + 1, 1)).count("1") for seed in range(200)) / 200
    assert 25 < ones < 28  # half of the bits change with the seed


def test_choices_are_requests_for_one_answer_each() -> None:
    one = Request((1, 2), SamplingParams(temperature=1.0, seed=4))
    three = Request((3,), SamplingParams(temperature=1.0, seed=4, n=3))
    found = choices([one, three])
    assert found[0] is one and len(found) == 4
    assert [each.params.seed for each in found[1:]] == [choice_seed(4, choice) for choice in range(3)]
    assert [each.choice for each in found] == [None, (1, 0), (1, 1), (1, 2)]
    assert all(each.params.n == 1 and each.ids == (3,) for each in found[1:])
    assert found[1].params == one.params  # the same answer as without n


def test_what_may_be_put_back_may_begin_with_all_it_has_said() -> None:
    """So that its second prompt finds everything compiled."""
    asked = [Request((1,) * length, SamplingParams(max_new_tokens=new)) for length, new in ((1, 30), (20, 3), (5, 900))]
    plain, longest = Workload.of(asked, 2), Workload.of(asked, 2, 100)
    assert (plain.prompt_tokens, plain.prefill_tokens, plain.longer_prompts) == (20, 25, 2)
    assert (longest.prompt_tokens, longest.prefill_tokens, longest.longer_prompts) == (99, 99 + 30, 2)
