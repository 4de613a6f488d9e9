"""Kept: what is asked for stays, within bounds."""

import random

import pytest

from epmoe.server.kept import Kept, Limits


def test_it_comes_back_as_it_was() -> None:
    kept = Kept(Limits())
    kept.keep("a", {"id": "a", "x": [1.5, None, "é"]}, [{"role": "user", "content": "b"}])
    assert kept.get("a") == ({"id": "a", "x": [1.5, None, "é"]}, [{"role": "user", "content": "b"}])
    assert kept.get("b") is None and kept.drop("a") and not kept.drop("a") and kept.size == 0


@pytest.mark.parametrize("limits", [Limits(number=4), Limits(size=400), Limits(number=0)])
def test_the_one_asked_for_least_recently_goes_first(limits: Limits) -> None:
    """Against a list that is searched, with answers of any size; sizes add up at all times."""
    rng, kept, order = random.Random(0), Kept(limits), list[str]()
    sizes: dict[str, int] = {}
    for number in range(300):
        id = str(number) if rng.random() < 0.5 else str(rng.randrange(number + 1))
        if rng.random() < 0.3:
            assert (kept.get(id) is not None) == (id in order)
            if id in order:
                order.append(order.pop(order.index(id)))
            continue
        text = "x" * rng.randrange(120)
        kept.keep(id, {"text": text}, [])
        order = [each for each in order if each != id] + [id]
        sizes[id] = len(f'[{{"text":"{text}"}},[]]')
        while len(order) > limits.number or sum(sizes[each] for each in order) > limits.size:
            order.pop(0)
        assert list(kept.found) == order and kept.size == sum(sizes[each] for each in order)
