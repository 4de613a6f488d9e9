"""The experts' tiles: the file that ships is sound, an unsound one is refused, tune.py chooses the fastest table."""

import copy
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from epmoe.moe.experts.triton.tiles import FILE, TILES, ExpertTile, read_tables, table, tile_for

ROOT = Path(__file__).resolve().parents[2]

CONTENT: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
FEW, SOME, MANY = "64x16x64x4x3", "128x32x64x4x3", "128x128x64x8x2"


def bf16(generation: str = "9") -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A copy of the file's content, and a table in it."""
    content = copy.deepcopy(CONTENT)
    return content, content["tiles"]["bfloat16"][generation]


def test_the_tile_follows_the_rows_of_an_expert() -> None:
    assert read_tables(CONTENT) == TILES
    for tables in TILES.values():
        for tiles in tables.values():
            for limit, tile in tiles[:-1]:
                assert tile_of(tiles, limit) == tile != tile_of(tiles, limit + 1 / 32)
    # 12 rows an expert are 96 tokens of 4 experts out of 32
    of = [str(tile_for(torch.bfloat16, 4 * tokens, 32, 0)) for tokens in (1, 96, 97, 100_000)]
    assert of == [FEW, FEW, SOME, "128x64x64x8x2"]
    assert table(torch.float32, 9) == table(torch.float32, 0) and table(torch.bfloat16, 99) == TILES[torch.bfloat16][0]


def tile_of(tiles: Any, rows: float) -> ExpertTile:
    return next(tile for limit, tile in tiles if rows <= limit)


def test_what_was_measured_stands_beside_the_choice() -> None:
    for generation, measured in CONTENT["measured"].items():
        assert {"device", "torch", "triton", "date", "command", "points"} <= set(measured)
        for _, tile in table(torch.bfloat16, int(generation)):
            assert all(point["us"][str(tile)] > 0 for point in measured["points"])


def test_the_tuner_tries_what_is_shipped() -> None:
    """Else a run of it would lose what was found by naming tiles by hand."""
    from scripts.bench.tune import CANDIDATES, HOPPER  # needs triton, as the kernels do

    tried = {0: CANDIDATES.split(), 9: (CANDIDATES + HOPPER).split()}
    for generation, names in tried.items():
        assert {str(tile) for _, tile in table(torch.bfloat16, generation)} <= set(names)


@pytest.mark.parametrize("name", [FEW, "hopper:128x96x64x4x2"])
def test_names_of_tiles(name: str) -> None:
    assert str(ExpertTile.parse(name)) == name
    assert ExpertTile.parse(FEW) == ExpertTile(weight_rows=64, tokens=16, words=64, warps=4, stages=3, kernel="triton")


RULES: dict[str, tuple[dict[str, Any], str]] = {
    "two orders of summation": ({"words": 32}, "one order of summation"),
    "a kernel that is not there": ({"kernel": "cuda"}, "unknown kernel 'cuda'; known: triton"),
    "limits that fall": ({"up_to": 5}, "at least double"),
    "limits too near": ({"up_to": 13}, "at least double"),
    "no limit in the middle": ({"up_to": None}, "at least double"),
    "half a strip": ({"kernel": "hopper", "weight_rows": 64}, "a multiple of 128 weight rows"),
    "warps without rows": ({"kernel": "hopper", "weight_rows": 128, "warps": 8}, "at least 32 a warp"),
    "three quarters of 64 tokens": ({"kernel": "hopper", "weight_rows": 128, "tokens": 48}, "96 or 128 tokens"),
    "half a group of warps": ({"kernel": "hopper", "weight_rows": 256, "warps": 6}, "a multiple of 4 warps"),
    "an unknown field": ({"splits": 2}, "has the fields"),
}


@pytest.mark.parametrize("case", RULES)
def test_a_table_that_breaks_a_rule_is_refused(case: str) -> None:
    change, message = RULES[case]
    content, tiles = bf16("0")
    tiles[1] |= change
    with pytest.raises(ValueError, match=f"bfloat16, generation 0: .*{message}"):
        read_tables(content)


def test_a_table_must_serve_every_size_and_every_device() -> None:
    content, tiles = bf16()
    tiles[-1]["up_to"] = 1000
    with pytest.raises(ValueError, match="the last tile must serve any number of rows"):
        read_tables(content)
    content, _ = bf16()
    del content["tiles"]["bfloat16"]["0"]
    with pytest.raises(ValueError, match="bfloat16: no table 0"):
        read_tables(content)


def points(*times: dict[str, float]) -> list[dict[str, Any]]:
    """Measurements at 1/8, 1/2, 2, 8 … rows an expert."""
    return [{"rows": 4.0**index / 8, "us": each} for index, each in enumerate(times)]


def chosen(*times: dict[str, float]) -> list[tuple[float, str]]:
    from scripts.bench.tune import best_table  # needs triton, as the kernels do

    return [(limit, str(tile)) for limit, tile in best_table(points(*times))]


def test_the_fastest_table_is_chosen() -> None:
    assert chosen({FEW: 10, MANY: 30}, {FEW: 20, MANY: 35}, {FEW: 90, MANY: 40}) == [(1.0, FEW), (math.inf, MANY)]
    assert chosen({FEW: 10, MANY: 30}, {FEW: 20, MANY: 35}) == [(math.inf, FEW)]
    # two percent are not worth another tile, four are
    assert chosen({FEW: 10, SOME: 12}, {FEW: 102, SOME: 100}) == [(math.inf, FEW)]
    assert chosen({FEW: 10, SOME: 12}, {FEW: 104, SOME: 100}) == [(0.25, FEW), (math.inf, SOME)]


def test_one_order_of_summation_is_kept() -> None:
    """The fastest tile of all is left out when the others of its order lose more than it gains."""
    other = "256x128x32x8x3"
    assert chosen({FEW: 10, MANY: 30, other: 30}, {FEW: 90, MANY: 50, other: 40}) == [(0.25, FEW), (math.inf, MANY)]
    assert chosen({FEW: 10, other: 11}, {FEW: 90, other: 40}) == [(math.inf, other)]


def test_a_tile_that_some_device_could_not_run_is_left_out() -> None:
    assert chosen({FEW: 10, MANY: 30}, {FEW: 20}) == [(math.inf, FEW)]


def test_points_of_the_same_size_count_together() -> None:
    from scripts.bench.tune import best_table

    same = [{"rows": 1, "us": {FEW: 10, SOME: 30}}, {"rows": 1, "us": {FEW: 20, SOME: 10}}]
    assert [str(tile) for _, tile in best_table(same)] == [FEW]


def test_limits_between_neighbours_double() -> None:
    """Another tile at each of 8, 16, 32 and 64 rows: the limits are √2 times these, and the file takes them."""
    from scripts.bench.tune import updated

    names = [FEW, SOME, MANY, "hopper:256x128x64x8x2"]
    times = [{"rows": 8 << best, "us": {name: 20 + (name != names[best]) for name in names}} for best in range(4)]
    content = updated(CONTENT, 10, times, {"device": "a GPU"})
    assert [(limit, str(tile)) for limit, tile in read_tables(content)[torch.bfloat16][10]] == [
        (11.3125, FEW),
        (22.625, SOME),
        (45.25, MANY),
        (math.inf, names[3]),
    ]


def test_only_the_table_of_that_generation_is_replaced() -> None:
    """The file is read back as it was written, and only valid tables are written."""
    from scripts.bench.tune import to_text, updated

    times = points({FEW: 10, MANY: 30}, {FEW: 20, MANY: 15})
    new = updated(CONTENT, 10, times, {"device": "a GPU"})
    assert json.loads(to_text(new)) == new
    assert {g: rows for g, rows in new["tiles"]["bfloat16"].items() if g != "10"} == CONTENT["tiles"]["bfloat16"]
    assert new["measured"]["9"] == CONTENT["measured"]["9"] and new["measured"]["10"]["points"] == times
    assert read_tables(new)[torch.bfloat16][10] == ((0.25, ExpertTile.parse(FEW)), (math.inf, ExpertTile.parse(MANY)))
    assert json.loads(to_text(CONTENT)) == CONTENT and FILE.read_text(encoding="utf-8") == to_text(CONTENT) + "\n"


@pytest.mark.gpu
def test_tune_writes_a_table(tmp_path: Path) -> None:
    import subprocess

    command = [sys.executable, str(ROOT / "scripts/bench/tune.py"), "--output", str(tmp_path / "tiles.json")]
    sizes = ["--experts", "8/32", "--tokens", "1,256", "--hidden", "256", "--intermediate", "256"]
    done = subprocess.run([*command, *sizes, "--tiles", f"{FEW} {SOME}"], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "tiles.json").read_text())
    generation = torch.cuda.get_device_capability()[0]
    assert content["measured"][str(generation)]["device"] == torch.cuda.get_device_name()
    assert {str(tile) for _, tile in read_tables(content)[torch.bfloat16][generation]} <= {FEW, SOME}
