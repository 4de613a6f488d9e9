"""The tables of who makes a product: what is read from them, and what is refused."""

import copy
import json
from typing import Any

import pytest

from epmoe.kernels.product import Tile
from epmoe.kernels.ways import FILE, TABLES, Way, read_tables, table, way_for

GOOD: dict[str, Any] = {
    "ways": {
        "9": {
            "5120x2880": [{"up_to": 8, "way": "few:16x8x512x1x3"}, {"up_to": None, "way": "library"}],
            "640x2880": [{"up_to": None, "way": "64x64x128x4x4"}],
        },
        "0": {"any": [{"up_to": None, "way": "library"}]},
    }
}


def test_names() -> None:
    for name in ("library", "few:16x8x512x1x3", "64x16x128x4x6"):
        assert str(Way.parse(name)) == name
    assert Way.parse("64x16x128x4x6") == Way("tiled", Tile(64, 16, 128, 4, 6))


def test_the_nearest_weight_on_the_generation_and_any_elsewhere() -> None:
    assert way_for(9, 5120, 2880, 8).kernel == "few" and way_for(9, 5120, 2880, 5000).kernel == "library"
    assert table(9, 6144, 2048) == table(9, 5120, 2880) != table(9, 2048, 4096) == table(9, 2880, 4096)
    assert table(12, 5120, 2880) == table(8, 7, 7) == TABLES[0][None]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("ways", "0"), {}, 'no table "0"'),
        (("ways", "9", "640x2880"), [], "generation 9, 640x2880: the last way must serve any number"),
        (("ways", "9", "640x2880", 0, "up_to"), 64, "the last way must serve any number"),
        (("ways", "9", "640x2880", 0, "way"), "slow:64x64x128x4x4", "unknown kernel 'slow'"),
        (("ways", "9", "5120x2880", 0, "up_to"), 16, "few:16x8x512x1x3 has room for 8 rows, and is to serve 16"),
        (("ways", "9", "5120x2880", 0, "up_to"), 0, "at least double"),
    ],
)
def test_a_table_that_breaks_a_rule_is_refused(path: tuple[Any, ...], value: Any, message: str) -> None:
    content = copy.deepcopy(GOOD)
    read_tables(content)
    at: Any = content
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    with pytest.raises(ValueError, match=message):
        read_tables(content)


def test_every_generation_of_the_file_says_where_it_was_measured() -> None:
    content = json.loads(FILE.read_text(encoding="utf-8"))
    assert set(content["measured"]) == set(content["ways"]) - {"0"}
    for measured in content["measured"].values():
        assert measured["device"] and measured["command"].startswith("scripts/bench/dense.py") and measured["points"]
