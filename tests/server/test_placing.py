"""Placing: the least work has it; what a replica has of a prompt's beginning is work that it need not do."""

from epmoe.server.placing import Placing


def test_the_least_work_has_it_and_of_equals_the_first() -> None:
    placing = Placing(4)
    assert placing.choose((1,), {0: 5, 1: 5, 2: 9}) == 0
    assert placing.choose((1,), {0: 5, 1: 4, 2: 9}) == 1


def test_a_conversation_stays_where_it_was() -> None:
    """As long as that replica has no more to do than is saved: at least a half of what the prompts share."""
    placing = Placing(4)
    first = tuple(range(40))
    assert placing.choose(first, {0: 10, 1: 0}) == 1
    longer = (*first, *range(100, 130))
    assert placing.choose(longer, {0: 0, 1: 31}) == 1
    assert placing.choose((7, *longer), {0: 0, 1: 1}) == 0  # another beginning
    assert placing.choose(longer, {0: 0, 1: 65}) == 0
    assert placing.choose(longer, {0: 1, 1: 0}) == 1  # both have it now


def test_what_is_shorter_than_a_page_is_in_no_cache() -> None:
    placing = Placing(4)
    assert placing.choose((1, 2, 3), {0: 1, 1: 0}) == 1
    assert placing.choose((1, 2, 3), {0: 0, 1: 1}) == 0
    assert not placing.known


def test_no_more_is_remembered_than_so_many_and_of_no_replica_that_is_gone() -> None:
    placing = Placing(1, most=10)
    for first in range(100):
        placing.choose((first, 1), {0: 1, 1: 0})
    assert len(placing.known) == 10
    assert placing.choose((99, 1), {0: 0, 1: 1}) == 1
    placing.forget([1])
    assert placing.choose((99, 1), {0: 0, 1: 1, 2: 1}) == 0
