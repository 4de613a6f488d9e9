"""The house keeps its rules (helpers/house.py), and each rule can be broken: small made-up trees show how."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from house import (
    RULES,
    Tree,
    cuda_has_its_folders,
    files_are_short,
    functions_fit_a_screen,
    functions_have_few_parameters,
    house,
    imports_form_no_circle,
    imports_go_down,
    light_modules_stay_light,
    outside_kernels,
    package_is_mirrored_by_tests,
    private_names_stay_home,
    triton_stays_with_kernels,
)


@pytest.mark.parametrize("rule", RULES)
def test_the_house_keeps(rule: str) -> None:
    assert sorted(RULES[rule](house())) == [], "these break the rule"


# --- every rule can fail ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A small made-up tree, and what the rule finds in it."""

    name: str
    rule: Callable[[Tree], set[str]]
    tree: Tree
    finds: set[str]


def called(count: int, prefix: str = "", suffix: str = "") -> str:
    """A function with so many parameters."""
    names = ", ".join(f"a{i}" for i in range(count))
    return f"def f({prefix}{names}{suffix}): ...\n"


def long(lines: int, more: str = "") -> str:
    """A function of so many lines, with `more` in front of its statements."""
    return "def f():\n" + more + "    x = 1\n" * (lines - 1)


HEART, SCHEDULER = "epmoe/moe/router/reference.py", "epmoe/engine/scheduler.py"
DEEP = {
    "epmoe/moe/a.py": "from epmoe.moe.b.c import x",
    "epmoe/moe/b/c.py": "",
    "epmoe/moe/b/d.py": "import epmoe.moe.a",
}

CASES = [
    Case(
        "up, wherever it stands",
        imports_go_down,
        {
            "epmoe/cache/pages.py": "import epmoe.errors\nfrom epmoe.batch import Step\nfrom epmoe.cache.plan import x",
            "epmoe/batch.py": "def f():\n    import epmoe.cache.pages",
            "epmoe/errors.py": "if TYPE_CHECKING:\n    from epmoe import batch",
            "epmoe/tables.py": "from .cache import pages",
            "epmoe/cache/plan.py": "",
        },
        {
            "epmoe/batch.py imports epmoe/cache/pages.py",
            "epmoe/errors.py imports epmoe/batch.py",
            "epmoe/tables.py imports epmoe/cache/pages.py",
        },
    ),
    Case(
        "a neighbour on the same floor, a package's own file",
        imports_go_down,
        {
            "epmoe/ranks/mesh.py": "import epmoe.formats",
            "epmoe/formats/__init__.py": "from epmoe import VERSION",
            "epmoe/__init__.py": "from epmoe.llm import LLM",
            "epmoe/llm.py": "",
            "epmoe/generate.py": "from epmoe import VERSION",
        },
        {
            "epmoe/ranks/mesh.py imports epmoe/formats/__init__.py",
            "epmoe/formats/__init__.py imports epmoe/__init__.py",
        },
    ),
    Case("a new folder", imports_go_down, {"epmoe/attic/x.py": ""}, {"epmoe/attic is on no floor"}),
    Case(
        "two files",
        imports_form_no_circle,
        {"epmoe/moe/a.py": "import epmoe.moe.b", "epmoe/moe/b.py": "def f(): from epmoe.moe import a"},
        {"epmoe/moe/: a circle of a.py, b.py"},
    ),
    Case("a file and a folder", imports_form_no_circle, DEEP, {"epmoe/moe/: a circle of a.py, b"}),
    Case(
        "three folders, and one that only leads there",
        imports_form_no_circle,
        {
            "epmoe/a/x.py": "import epmoe.b.x",
            "epmoe/b/x.py": "import epmoe.c.x",
            "epmoe/c/x.py": "import epmoe.a.y",
            "epmoe/a/y.py": "",
            "epmoe/d.py": "import epmoe.a.x",
        },
        {"epmoe/: a circle of a, b, c"},
    ),
    Case("no circle", imports_form_no_circle, {**DEEP, "epmoe/moe/b/d.py": '"import epmoe.moe.a"'}, set()),
    Case(
        "triton in a model",
        triton_stays_with_kernels,
        {
            "epmoe/models/x.py": "import triton_kernels",
            "epmoe/layers/x.py": "def f():\n    from triton.language import sum",
            "epmoe/moe/exchange/x.py": "import triton",
            "epmoe/kernels/exchange.py": "import triton",
            "epmoe/moe/router/triton/x.py": "import triton",
            "tests/test_x.py": "import triton",
        },
        {"epmoe/layers/x.py imports triton.language", "epmoe/moe/exchange/x.py imports triton"},
    ),
    Case(
        "cuda in a layer",
        cuda_has_its_folders,
        {
            "epmoe/layers/a.py": '"""cuda is free here."""\nif x.device.type == "cuda": ...  # cuda',
            "epmoe/layers/b.py": "stream = torch.cuda.Stream()",
            "epmoe/layers/c.py": "from torch import cuda",
            "epmoe/layers/d.py": "import torch.cuda",
            "epmoe/layers/e.py": 'name = f"cuda:{index}"',
            "epmoe/layers/f.py": 'barracudas = "barracuda"',
            "epmoe/ranks/x.py": 'torch.cuda.set_device("cuda")',
            "epmoe/kernels/x.py": 'torch.cuda.set_device("cuda")',
            "epmoe/bench/x.py": 'torch.cuda.set_device("cuda")',
        },
        {
            "epmoe/layers/a.py says 'cuda'",
            "epmoe/layers/b.py uses torch.cuda",
            "epmoe/layers/c.py uses torch.cuda",
            "epmoe/layers/d.py uses torch.cuda",
            "epmoe/layers/e.py says 'cuda:'",
        },
    ),
    Case(
        "brought in by another",
        light_modules_stay_light,
        {
            "epmoe/__init__.py": "",
            "epmoe/server/__main__.py": "",
            SCHEDULER: "import epmoe.batch",
            "epmoe/batch.py": "def f(): ...\nimport torch",
            "torch.py": "",
            HEART: "import epmoe.ranks.mesh, hydra.core",
            "epmoe/ranks/mesh.py": "",
            "hydra/core.py": "",
        },
        {
            "import epmoe.engine.scheduler brings in torch",
            "import epmoe.moe.router.reference brings in epmoe.ranks",
            "import epmoe.moe.router.reference brings in hydra",
        },
    ),
    Case(
        "light, and absent",
        light_modules_stay_light,
        {
            "epmoe/__init__.py": "",
            "epmoe/server/__main__.py": "",
            HEART: "import torch",
            "torch.py": "",
            "epmoe/ranks/mesh.py": "",
        },
        {"import epmoe.engine.scheduler fails: ModuleNotFoundError: No module named 'epmoe.engine'"},
    ),
    Case(
        "seven parameters",
        functions_have_few_parameters,
        {
            "epmoe/cache/a.py": called(7),
            "epmoe/cache/b.py": called(6),
            "epmoe/cache/c.py": called(5, "self, ", ", *rest, **more"),
            "epmoe/cache/d.py": "class A:\n    " + called(6, "self, ") + "    @staticmethod\n    " + called(7),
            "epmoe/cache/e.py": "def g():\n    async " + called(3, "x, y, /, ", ", *, z, u"),
            "epmoe/kernels/x.py": called(70),
            "epmoe/moe/experts/triton/x.py": called(70),
        },
        {
            "epmoe/cache/a.py: f has 7 parameters",
            "epmoe/cache/c.py: f has 8 parameters",
            "epmoe/cache/d.py: A.f has 7 parameters",
            "epmoe/cache/e.py: g.f has 7 parameters",
        },
    ),
    Case(
        "a line too many",
        functions_fit_a_screen,
        {
            "epmoe/cache/a.py": long(51),
            "epmoe/cache/b.py": long(50),
            "epmoe/cache/c.py": long(50, '    """One.\n\n    Two.\n    """\n'),
            "epmoe/cache/d.py": long(50, "    1.0\n"),
            "epmoe/kernels/x.py": long(51),
        },
        {"epmoe/cache/a.py: f has 51 lines", "epmoe/cache/d.py: f has 51 lines"},
    ),
    Case(
        "a long file",
        files_are_short,
        {
            "epmoe/cache/a.py": "\n" * 401,
            "epmoe/cache/b.py": "\n" * 400,
            "tests/test_x.py": "\n" * 401,
            "epmoe/kernels/x.py": "\n" * 401,
        },
        {"epmoe/cache/a.py has 401 lines", "tests/test_x.py has 401 lines"},
    ),
    Case(
        "a test of nothing",
        package_is_mirrored_by_tests,
        {
            "epmoe/moe/router/reference.py": "",
            "epmoe/generate.py": "",
            "tests/moe/router/test_any.py": "",
            "tests/moe/test_any.py": "",
            "tests/test_generate.py": "",
            "tests/generate/test_any.py": "",
            "tests/test_architecture.py": "",
            "tests/whole/test_any.py": "",
            "tests/router/test_any.py": "",
            "tests/test_router.py": "",
            "tests/helpers/test_any.py": "",
            "tests/helpers/spawn.py": "",
        },
        {
            f"tests/{name}.py mirrors nothing of the package"
            for name in ("router/test_any", "test_router", "helpers/test_any")
        },
    ),
    Case(
        "a private name taken",
        private_names_stay_home,
        {
            "epmoe/cache/a.py": "from epmoe.batch import _spans, Step\nStep._made, self._x",
            "epmoe/batch.py": "import os\nfrom torch import _C\nos._exit(0)",
            "epmoe/llm.py": "from epmoe import batch, __version__\nbatch._spans()",
            "scripts/x.py": "import epmoe.batch\nepmoe.batch._spans()",
            "tests/test_x.py": "from epmoe.batch import _spans",
        },
        {
            "epmoe/cache/a.py takes epmoe.batch._spans",
            "epmoe/llm.py takes batch._spans",
            "scripts/x.py takes epmoe.batch._spans",
        },
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.rule.__name__}: {case.name}")
def test_a_rule_finds_what_breaks_it(case: Case) -> None:
    assert case.rule(case.tree) == case.finds


def test_no_rule_can_pass_emptily() -> None:
    """Each is broken by a case, and has files of this repository to look at."""
    assert {case.rule.__name__ for case in CASES if case.finds} == RULES.keys()
    assert len(outside_kernels(house())) > 40 and any(path.startswith("tests/moe/router/") for path in house())
