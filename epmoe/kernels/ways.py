"""How a product of so many rows is made: the tables of ways.json, never a measurement at run time.

scripts/bench/dense.py measures the candidates on a GPU, chooses, and writes the file, with what it measured and where:

    {"ways":     {"9": {"5120x2880": [{"up_to": 8, "way": "few:16x8x512x1x3"}, …,
                                      {"up_to": null, "way": "library"}], …},
                  "0": {"any": […]}},
     "measured": {"9": {"device": …, "points": [{"product": "5120x2880", "rows": 1, "us": {"library": 11.9, …}}, …]}}}

"9" is a GPU's generation, the first number of its compute capability; "0" serves every device that has no table of its
own. "5120x2880" are outputs and columns of a weight; others take the table of the nearest. `up_to` is the number of
rows up to which the way serves; null is no limit. All ways give the same bits, so no choice shows in a result.

Letters: T rows · H columns · N outputs.
"""

import json
from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from math import inf, log
from pathlib import Path
from typing import Any, NamedTuple

from epmoe.kernels.product import Tile

FILE = Path(__file__).with_name("ways.json")
# Those of products.py and few.py, with a tile each, and of vendor.py, without one.
KERNELS = ("tiled", "few", "library")


class Way(NamedTuple):
    """A kernel, and its tile where it has one."""

    kernel: str
    tile: Tile | None = None

    @classmethod
    def parse(cls, name: str) -> "Way":
        """The inverse of str(): "64x16x128x4x6", "few:16x8x512x1x3", "library"."""
        if name == "library":
            return cls(name)
        kernel, _, tile = name.rpartition(":")
        return cls(kernel or "tiled", Tile.parse(tile))

    def __str__(self) -> str:
        if self.tile is None:
            return self.kernel
        return str(self.tile) if self.kernel == "tiled" else f"{self.kernel}:{self.tile}"


Table = tuple[tuple[float, Way], ...]  # (most rows, their way), ascending
Size = tuple[int, int]  # outputs and columns of a weight


def read_tables(content: Mapping[str, Any]) -> dict[int, dict[Size | None, Table]]:
    """{generation: {size: table}} of the file's content; the size of "any" is None.

    Raises:
        ValueError: a table that breaks a rule; the message names it and the rule.
    """
    found: dict[int, dict[Size | None, Table]] = {}
    for generation, tables in content["ways"].items():
        found[int(generation)] = {
            _size(name): _read_table(f"generation {generation}, {name}", entries) for name, entries in tables.items()
        }
    if list(found.get(0, ())) != [None]:
        raise ValueError('no table "0" of "any", for devices that have no table of their own')
    return found


def _size(name: str) -> Size | None:
    if name == "any":
        return None
    outputs, columns = map(int, name.split("x"))
    return outputs, columns


def _read_table(where: str, entries: list[dict[str, Any]]) -> Table:
    limits = [inf if entry["up_to"] is None else float(entry["up_to"]) for entry in entries]
    ways = [Way.parse(entry["way"]) for entry in entries]
    if not entries or limits[-1] != inf:
        raise ValueError(f"{where}: the last way must serve any number of rows (up_to: null)")
    # `kernels.distinct` names 1, 2, 4 … rows, which must meet every tile.
    if limits[0] < 1 or any(above < 2 * below for below, above in pairwise(limits)):
        raise ValueError(f"{where}: up_to must at least double from way to way, from 1 on, and is {limits}")
    for limit, way in zip(limits, ways, strict=True):
        if way.kernel not in KERNELS:
            raise ValueError(f"{where}: unknown kernel {way.kernel!r}; known: {', '.join(KERNELS)}")
        if way.kernel == "few" and way.tile is not None and limit > way.tile.tokens:
            raise ValueError(f"{where}: {way} has room for {way.tile.tokens} rows, and is to serve {limit:g}")
    return tuple(zip(limits, ways, strict=True))


TABLES = read_tables(json.loads(FILE.read_text(encoding="utf-8")))


@cache
def table(generation: int, outputs: int, columns: int) -> Table:
    """The table of the nearest weight, as a ratio of both sizes."""
    tables = TABLES.get(generation, TABLES[0])

    def distance(size: Size | None) -> float:
        return 0 if size is None else abs(log(outputs / size[0])) + abs(log(columns / size[1]))

    return tables[min(tables, key=distance)]


def way_for(generation: int, outputs: int, columns: int, tokens: int) -> Way:
    return next(way for limit, way in table(generation, outputs, columns) if tokens <= limit)
