"""The rules of the house: each is a function from {path: source} to what breaks it, read from the syntax tree.

An import counts wherever it stands, within a function and under `if TYPE_CHECKING` too: all of them make a reader go
there. Names in strings (the tables of backends) do not. What a rule finds it says without line numbers, so that a list
of findings changes only when something is mended.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from itertools import chain
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[2]

# What lies in epmoe/, from the ground up; `__init__` is the package's own file. A floor imports only floors below it.
FLOORS = (
    {"streams"},
    {"errors"},
    {"batch", "rehearsal", "strictjson", "tables", "trace"},
    {"config", "formats", "ranks"},
    {"cache"},
    {"kernels"},
    {"layers"},
    {"moe"},
    {"models"},
    {"engine"},
    {"weights"},
    {"text"},
    {"server"},
    {"llm"},
    {"async_llm"},
    {"__init__"},
    {"bench", "chat", "demo", "follow", "generate", "integrations", "serve"},
    {"__main__"},
)

PARAMETERS, FILE_LINES, FUNCTION_LINES = 6, 400, 50

# Importing the module in a fresh interpreter must bring in none of these, nor anything within them.
LIGHT = {
    "epmoe.engine.scheduler": ("torch",),  # host only
    "epmoe.server.__main__": ("torch", "hydra", "pydantic"),  # it starts, and starts again, in half a second
    "epmoe.moe.router.reference": ("epmoe.ranks", "hydra"),  # a reader takes the heart out and plays with it
}

TEST_FOLDERS = {"clients", "whole", "tools"}  # of tests that belong to no folder of the package
TEST_FILES = {"test_architecture"}

Tree = dict[str, str]  # a path from the repository's root, with slashes → the file's text
Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def house() -> Tree:
    """This repository's Python files, and the names of the package's other files, such as the embedded model's."""
    files = chain.from_iterable((ROOT / folder).rglob("*.py") for folder in ("epmoe", "tests", "scripts"))
    others = (file for file in (ROOT / "epmoe").rglob("*.*") if file.suffix not in (".py", ".pyc"))
    texts = {file: file.read_text() for file in sorted(files)} | dict.fromkeys(others, "")
    return {file.relative_to(ROOT).as_posix(): text for file, text in texts.items()}


# --- what the rules share ---------------------------------------------------------------------------------------------


@cache
def parsed(source: str) -> ast.Module:
    return ast.parse(source)


def package(tree: Tree) -> Tree:
    return {path: source for path, source in tree.items() if re.match(r"epmoe/.*\.py$", path)}


def outside_kernels(tree: Tree) -> Tree:
    return {path: source for path, source in package(tree).items() if not of_kernels(path)}


def of_kernels(path: str) -> bool:
    return re.match(r"epmoe/(kernels|moe/\w+/triton)/", path) is not None


def imports(path: str, source: str) -> Iterator[tuple[str, str]]:
    """(module, name taken from it, or "" for the module itself) of each import; relative ones are made absolute."""
    for node in ast.walk(parsed(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = PurePosixPath(path).parts[: -node.level] if node.level else ()
            module = ".".join((*above, *([node.module] if node.module else [])))
            yield from ((module, alias.name) for alias in node.names)


def file_of(module: str, tree: Tree) -> str | None:
    base = module.replace(".", "/")
    return next((path for path in (f"{base}.py", f"{base}/__init__.py") if path in tree), None)


def imported_files(path: str, tree: Tree) -> set[str]:
    """The tree's files that `path` imports by name; not the `__init__` of the folders on the way."""
    found = (file_of(f"{module}.{name}", tree) or file_of(module, tree) for module, name in imports(path, tree[path]))
    return {file for file in found if file is not None}


def functions(source: str) -> Iterator[tuple[str, Function, bool]]:
    """(qualified name, function, whether a first argument `self` or `cls` is bound) of all functions, nested too."""

    def walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, Function, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Function):
                static = any(isinstance(each, ast.Name) and each.id == "staticmethod" for each in child.decorator_list)
                yield prefix + child.name, child, isinstance(node, ast.ClassDef) and not static
            named = isinstance(child, Function | ast.ClassDef)
            yield from walk(child, f"{prefix}{child.name}." if named else prefix)  # type: ignore[attr-defined]

    return walk(parsed(source), "")


def docstrings(source: str) -> set[ast.AST]:
    """Texts that are statements of their own: what they say is free."""
    statements = (node for node in ast.walk(parsed(source)) if isinstance(node, ast.Expr))
    return {node.value for node in statements if isinstance(node.value, ast.Constant)}


# --- the rules --------------------------------------------------------------------------------------------------------


def imports_go_down(tree: Tree) -> set[str]:
    """A file imports its own folder or a lower floor."""
    floor_of = {name: floor for floor, names in enumerate(FLOORS) for name in names}

    def name_of(path: str) -> str:
        return PurePosixPath(path).with_suffix("").parts[1]

    found = {f"epmoe/{name} is on no floor" for name in map(name_of, package(tree)) if name not in floor_of}
    for path in package(tree):
        for other in imported_files(path, package(tree)):
            here, there = name_of(path), name_of(other)
            if here != there and {here, there} <= floor_of.keys() and floor_of[there] >= floor_of[here]:
                found.add(f"{path} imports {other}")
    return found


def imports_form_no_circle(tree: Tree) -> set[str]:
    """In each folder, what lies in it (files, and folders as wholes) imports each other in one direction only.

    A circle of files anywhere shows in the folder that holds all of them.
    """
    graphs: dict[str, dict[str, set[str]]] = {}  # folder → what lies in it → what lies in it
    for path in package(tree):
        for other in imported_files(path, package(tree)):
            here, there = PurePosixPath(path).parts, PurePosixPath(other).parts
            depth = next((i for i, (a, b) in enumerate(zip(here, there, strict=False)) if a != b), None)
            if depth is not None:
                graphs.setdefault("/".join(here[:depth]), {}).setdefault(here[depth], set()).add(there[depth])

    def reached(graph: dict[str, set[str]], name: str) -> set[str]:
        seen: set[str] = set()
        ahead = [name]
        while ahead:
            new = graph.get(ahead.pop(), set()) - seen
            seen |= new
            ahead += new
        return seen

    found = set()
    for folder, graph in graphs.items():
        for name in graph:
            circle = {other for other in reached(graph, name) if name in reached(graph, other)}
            if circle:
                found.add(f"{folder}/: a circle of {', '.join(sorted(circle))}")
    return found


def triton_stays_with_kernels(tree: Tree) -> set[str]:
    """`triton` is imported in kernels/ and moe/*/triton/ only."""
    return {
        f"{path} imports {module}"
        for path, source in outside_kernels(tree).items()
        for module, _ in imports(path, source)
        if module.split(".")[0] == "triton"
    }


def cuda_has_its_folders(tree: Tree) -> set[str]:
    """No text names cuda, and nothing of torch.cuda is used, outside ranks/, kernels/ and bench/; docstrings may."""
    found = set()
    for path, source in package(tree).items():
        if re.match(r"epmoe/(ranks|kernels|bench)/", path):
            continue
        free = docstrings(source)
        for node in ast.walk(parsed(source)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in free:
                if re.search(r"\bcuda\b", node.value):
                    found.add(f"{path} says {node.value!r}")
            elif isinstance(node, ast.Attribute) and node.attr == "cuda" and ast.unparse(node.value) == "torch":
                found.add(f"{path} uses torch.cuda")
        if any(f"{module}.{name}".startswith("torch.cuda") for module, name in imports(path, source)):
            found.add(f"{path} uses torch.cuda")
    return found


def light_modules_stay_light(tree: Tree) -> set[str]:
    """The modules of LIGHT, each imported in a fresh interpreter, whichever modules they import in turn."""
    found = set()
    with TemporaryDirectory() as folder:
        for path, source in tree.items():
            file = Path(folder, path)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(source)
        for module, unwanted in LIGHT.items():
            # The interpreter searches the folder that it runs in first, so these files are the ones imported.
            run = [sys.executable, "-c", f"import {module}, sys; print(*sys.modules)"]
            done = subprocess.run(run, cwd=folder, capture_output=True, text=True)
            if done.returncode:
                found.add(f"import {module} fails: {done.stderr.splitlines()[-1]}")
            found |= {f"import {module} brings in {name}" for name in unwanted if name in done.stdout.split()}
    return found


def functions_have_few_parameters(tree: Tree) -> set[str]:
    """At most PARAMETERS outside kernels; `self` is not counted, `*args` and `**options` are one each."""
    found = set()
    for path, source in outside_kernels(tree).items():
        for name, function, bound in functions(source):
            a = function.args
            variadic = (a.vararg is not None) + (a.kwarg is not None)
            count = len(a.posonlyargs) + len(a.args) + len(a.kwonlyargs) + variadic - bound
            if count > PARAMETERS:
                found.add(f"{path}: {name} has {count} parameters")
    return found


def functions_fit_a_screen(tree: Tree) -> set[str]:
    """At most FUNCTION_LINES outside kernels, without decorators and docstring."""
    found = set()
    for path, source in outside_kernels(tree).items():
        for name, function, _ in functions(source):
            assert function.end_lineno is not None
            first = function.body[0]
            told = first.end_lineno - first.lineno + 1 if ast.get_docstring(function) and first.end_lineno else 0
            if (lines := function.end_lineno - function.lineno + 1 - told) > FUNCTION_LINES:
                found.add(f"{path}: {name} has {lines} lines")
    return found


def files_are_short(tree: Tree) -> set[str]:
    """At most FILE_LINES outside kernels, tests and scripts among them."""
    counts = {path: source.count("\n") for path, source in tree.items() if not of_kernels(path)}
    return {f"{path} has {lines} lines" for path, lines in counts.items() if lines > FILE_LINES}


def package_is_mirrored_by_tests(tree: Tree) -> set[str]:
    """tests/<folder>/test_<any>.py belongs to epmoe/<folder>/, tests/test_<file>.py to epmoe/<file>.py."""
    folders = {str(folder) for path in tree for folder in PurePosixPath(path).parents}
    found = set()
    for path in tree:
        file = PurePosixPath(path)
        if file.parts[0] != "tests" or not file.name.startswith("test_"):
            continue
        if len(file.parts) == 2:
            kept = file.stem in TEST_FILES or f"epmoe/{file.stem.removeprefix('test_')}.py" in tree
        else:
            within = "/".join(file.parts[1:-1])
            kept = within in TEST_FOLDERS or f"epmoe/{within}" in folders or f"epmoe/{within}.py" in tree
        if not kept:
            found.add(f"{path} mirrors nothing of the package")
    return found


def private_names_stay_home(tree: Tree) -> set[str]:
    """No file takes a name with a leading underscore out of another module of the package; a test may."""
    found = set()
    for path, source in tree.items():
        if path.startswith("tests/"):
            continue
        taken = [(module, name) for module, name in imports(path, source) if module.split(".")[0] == "epmoe"]
        found |= {f"{path} takes {module}.{name}" for module, name in taken if private(name)}
        modules = {name or module for module, name in taken if file_of(f"{module}.{name}" if name else module, tree)}
        for node in ast.walk(parsed(source)):
            if isinstance(node, ast.Attribute) and private(node.attr) and ast.unparse(node.value) in modules:
                found.add(f"{path} takes {ast.unparse(node)}")
    return found


def private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


RULES: dict[str, Callable[[Tree], set[str]]] = {
    rule.__name__: rule
    for rule in (
        imports_go_down,
        imports_form_no_circle,
        triton_stays_with_kernels,
        cuda_has_its_folders,
        light_modules_stay_light,
        functions_have_few_parameters,
        functions_fit_a_screen,
        files_are_short,
        package_is_mirrored_by_tests,
        private_names_stay_home,
    )
}
