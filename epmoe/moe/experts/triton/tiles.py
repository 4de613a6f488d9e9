"""Which tile a product of the experts runs with: the tables of tiles.json, never a measurement at run time.

scripts/bench/tune.py measures the candidates on a GPU, chooses, and writes the file, with what it measured and where:

    {"tiles":    {"bfloat16": {"9": [{"up_to": 12, "kernel": "triton", "weight_rows": 64, …}, …, {"up_to": null, …}],
                               "0": […]}, …},
     "measured": {"9": {"device": …, "points": [{"rows": 0.125, …, "us": {"64x16x64x4x3": 32.6, …}}, …]}}}

"9" is a GPU's generation, the first number of its compute capability (8 Ampere, 9 Hopper, 10 Blackwell); "0" serves
every device that has no table of its own. `up_to` is the mean number of rows of an expert, T·K/E over all ranks, up to
which the tile serves; null is no limit.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

FILE = Path(__file__).with_name("tiles.json")
KERNELS = ("triton", "hopper")  # kernels.py, hopper_kernels.py


@dataclass(frozen=True)
class ExpertTile:
    """What one program computes: `weight_rows` × `tokens`, `words` of 4 columns at a time."""

    weight_rows: int
    tokens: int
    words: int
    warps: int
    stages: int
    kernel: str = "triton"

    @classmethod
    def parse(cls, name: str) -> "ExpertTile":
        """The inverse of str(): "64x16x64x4x3", of another kernel than triton "hopper:128x64x64x4x2"."""
        kernel, _, sizes = name.rpartition(":")
        weight_rows, tokens, words, warps, stages = map(int, sizes.split("x"))
        return cls(weight_rows, tokens, words, warps, stages, kernel or "triton")

    @property
    def run(self) -> int:
        """Rows of an expert that a program takes while more are left, a power of two; at the end up to `tokens`.

        >>> ExpertTile.parse("hopper:128x96x64x4x2").run, ExpertTile.parse("64x16x64x4x3").run
        (64, 16)
        """
        return 1 << self.tokens.bit_length() - 1

    def __str__(self) -> str:
        sizes = f"{self.weight_rows}x{self.tokens}x{self.words}x{self.warps}x{self.stages}"
        return sizes if self.kernel == "triton" else f"{self.kernel}:{sizes}"


Table = tuple[tuple[float, ExpertTile], ...]  # (most rows of an expert, its tile), ascending


def read_tables(content: Mapping[str, Any]) -> dict[torch.dtype, dict[int, Table]]:
    """{dtype: {generation: table}} of the file's content.

    Raises:
        ValueError: a table that breaks a rule; the message names it and the rule.
    """
    found: dict[torch.dtype, dict[int, Table]] = {}
    for dtype, tables in content["tiles"].items():
        read = {
            int(generation): _read_table(f"{dtype}, generation {generation}", rows)
            for generation, rows in tables.items()
        }
        if 0 not in read or any(tile.kernel != "triton" for _, tile in read[0]):
            raise ValueError(f"{dtype}: no table 0 of triton's tiles, for devices and sizes that others do not serve")
        found[getattr(torch, dtype)] = read
    return found


def _read_table(where: str, rows: list[dict[str, Any]]) -> Table:
    names = {item.name for item in fields(ExpertTile)}
    for row in rows:
        if set(row) != names | {"up_to"}:
            raise ValueError(f"{where}: a tile has the fields {sorted(row)}, not {sorted(names | {'up_to'})}")
    limits = [float("inf") if row["up_to"] is None else float(row["up_to"]) for row in rows]
    tiles = [ExpertTile(**{name: row[name] for name in names}) for row in rows]
    if not rows or limits[-1] != float("inf"):
        raise ValueError(f"{where}: the last tile must serve any number of rows (up_to: null)")
    # `TritonExperts.distinct` names 1, 2, 4 … tokens, which must meet every tile.
    if limits[0] <= 0 or any(below == float("inf") or above < 2 * below for below, above in pairwise(limits)):
        raise ValueError(f"{where}: up_to must at least double from tile to tile, above 0, and is {limits}")
    # `words` is the order along the contraction (kernels.py): a row must have the same bits in a decode step and
    # in a prefill.
    if len({tile.words for tile in tiles}) > 1:
        raise ValueError(f"{where}: one order of summation needs the same words in all tiles: {list(map(str, tiles))}")
    # The last rows take half a tile (hopper_kernels.py): whole strips of 64, 16 rows a warp at least, tokens by 8. Its
    # products are of groups of four warps.
    for tile in (tile for tile in tiles if tile.kernel == "hopper"):
        if tile.weight_rows % 128 or tile.weight_rows < 32 * tile.warps:
            raise ValueError(f"{where}: {tile} must have a multiple of 128 weight rows, at least 32 a warp")
        if tile.tokens not in (16, 32, 64, 96, 128) or tile.warps % 4:
            raise ValueError(f"{where}: {tile} must have 16, 32, 64, 96 or 128 tokens and a multiple of 4 warps")
    if unknown := {tile.kernel for tile in tiles} - set(KERNELS):
        raise ValueError(f"{where}: unknown kernel {sorted(unknown)[0]!r}; known: {', '.join(KERNELS)}")
    return tuple(zip(limits, tiles, strict=True))


TILES = read_tables(json.loads(FILE.read_text(encoding="utf-8")))


def table(dtype: torch.dtype, generation: int) -> Table:
    tables = TILES[dtype]
    return tables.get(generation, tables[0])


def tile_for(dtype: torch.dtype, slots: int, num_experts: int, generation: int) -> ExpertTile:
    """The tile for T·K slots over all E experts. What a rank holds must not enter: see kernels.py, Order."""
    return next(tile for limit, tile in table(dtype, generation) if slots <= limit * num_experts)


def hopper_serves(columns: int) -> bool:
    """Whether hopper_kernels.py knows rows of so many columns: whole runs of 256, and at most one of 64 at the end."""
    pairs = -(-columns // 64)
    return pairs >= 4 and pairs % 4 <= 1
