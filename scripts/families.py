"""Which of transformers' families epmoe's experts serve: asks the installed release and writes docs/transformers.md.

usage: python -m scripts.families            the table, on standard output
       python -m scripts.families --write    into docs/transformers.md, between its two marks

Every class that takes transformers' experts interface is made, small, with random weights; what epmoe computes of it is
compared with its own eager forward. Families that keep experts in classes of their own are found in the sources.
"""

import argparse
import ast
import importlib
import inspect
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from epmoe.integrations.transformers.experts import epmoe_experts
from epmoe.integrations.transformers.fit import PROJECTIONS, Layout, UnfitError, layout_of

DOC = Path(__file__).resolve().parents[1] / "docs" / "transformers.md"
MARKS = ("<!-- scripts/families.py writes from here", "<!-- to here -->")
MODELS = Path(inspect.getfile(transformers)).parent / "models"
HIDDEN, INTERMEDIATE, EXPERTS, TOKENS, TOP_K = 64, 32, 4, 16, 3
# Sums of at most 64 products in float32, in two orders.
ERROR = 1e-4
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size")  # None in some defaults
OWN = re.compile(r"(Experts|MoE|Moe|MoeBlock|MoEBlock|SparseMLP|MoeLayer|FFNRouter)$")


@dataclass(frozen=True)
class Row:
    """One class of experts."""

    family: str
    name: str
    what: str  # its layout in words, or why it does not fit
    fits: bool
    parallel: bool = False  # its family has an expert-parallel plan

    def __str__(self) -> str:
        return f"| {self.family} | `{self.name}` | {self.what} |"


def rows() -> Iterator[Row]:
    """All families of the installed release, in the order of the alphabet."""
    for file in sorted(MODELS.glob("*/modeling_*.py")):
        classes = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.ClassDef)]
        taking = [node.name for node in classes if any(map(_is_interface, node.decorator_list))]
        if taking:
            module = importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}")
            yield from (row(file.parent.name, getattr(module, name)) for name in taking)
        elif own := [node.name for node in classes if OWN.search(node.name)]:
            yield Row(file.parent.name, own[0], "keeps its experts outside transformers' experts interface", False)


def row(family: str, experts_class: type[nn.Module]) -> Row:
    """One class: whether epmoe computes what it does."""
    found = next(made(experts_class), None)
    if found is None:
        return Row(family, experts_class.__name__, "cannot be made from any default configuration of its family", False)
    config, experts = found
    try:
        layout = layout_of(experts)
    except UnfitError as error:
        return Row(family, experts_class.__name__, str(error), False)
    apart = difference(experts, layout)
    if not apart < ERROR:
        return Row(family, experts_class.__name__, f"computes something else: {apart:.0e} apart", False)
    plan = getattr(config, "base_model_ep_plan", None) or {}
    return Row(family, experts_class.__name__, words(layout), True, parallel="ep_dispatch_experts" in plan.values())


def made(experts_class: type[nn.Module]) -> Iterator[tuple[Any, nn.Module]]:
    """Default configurations of the family from which the class can be made, and what is made, on the meta device."""
    package = importlib.import_module(experts_class.__module__.replace(".modeling_", ".configuration_"))
    sizes = (INTERMEDIATE,) * (len(inspect.signature(experts_class).parameters) - 1)  # of a class that asks for more
    for name, value in vars(package).items():
        if inspect.isclass(value) and issubclass(value, transformers.PreTrainedConfig) and name.endswith("Config"):
            try:
                config: Any = value()
                if config.is_heterogeneous:  # its layers have configurations of their own
                    config = config.per_layer_config[len(config.per_layer_config) - 1]
                for count in (each for each in COUNTS if getattr(config, each, 0) is None):
                    setattr(config, count, EXPERTS)
                with torch.device("meta"):
                    experts = experts_class(config, *sizes)
            except (AttributeError, TypeError, ValueError, KeyError):
                continue  # of another part of the model, an encoder's for example
            yield config, experts


def difference(experts: Any, layout: Layout) -> float:
    """The largest difference of the two forwards, by the size of the class's own, on a small module of that class."""
    torch.manual_seed(0)
    shapes = ((2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE))
    for name, (out, columns) in zip(PROJECTIONS, shapes, strict=True):
        value = torch.randn(EXPERTS, out, columns) / math.sqrt(columns) * 2
        value = value.transpose(1, 2).contiguous() if layout.transposed else value
        setattr(experts, name, nn.Parameter(value, requires_grad=False))
        if layout.bias:
            setattr(experts, f"{name}_bias", nn.Parameter(torch.randn(EXPERTS, out), requires_grad=False))
    experts.num_experts = EXPERTS
    experts.config._experts_implementation = "eager"
    x_TH, weight_TK = torch.randn(TOKENS, HIDDEN), torch.rand(TOKENS, TOP_K)
    index_TK = torch.rand(TOKENS, EXPERTS).argsort(1)[:, :TOP_K]
    with torch.no_grad():
        expected_TH = experts(x_TH, index_TK, weight_TK)
        found_TH = epmoe_experts(experts, x_TH, index_TK, weight_TK)
    return float((found_TH - expected_TH).abs().max() / expected_TH.abs().max())


def words(layout: Layout) -> str:
    """What lies how, and the gate."""
    act = layout.activation
    gate = "SwiGLU" if act.alpha == 1 else f"sigmoid({act.alpha:g}·gate)"
    gate += f", up + {act.up_offset:g}" * bool(act.up_offset)
    gate += "" if math.isinf(act.limit) else f", clamped at {act.limit:g}"
    order = "interleaved" if layout.interleaved else "gates, then ups"
    return f"{gate}; {order}{', transposed' * layout.transposed}{', biases' * layout.bias}"


def text() -> str:
    """Two tables in Markdown."""
    found = list(rows())
    fit, unfit = ([row for row in found if row.fits is fits] for fits in (True, False))
    head = f"With transformers {transformers.__version__} {len(fit)} classes of experts fit, {len(unfit)} do not. Of "
    return "\n".join(
        [
            f"{head}those that fit, {sum(row.parallel for row in fit)} have an expert-parallel plan.",
            "",
            "| family | class | its gate; how its weights lie |",
            "|---|---|---|",
            *map(str, fit),
            "",
            "| family | class | why not |",
            "|---|---|---|",
            *map(str, unfit),
        ]
    )


def between_marks(document: str, table: str) -> str:
    """The document with the table in its place."""
    before, _, rest = document.partition(MARKS[0])
    mark, _, rest = rest.partition("\n")
    _, _, after = rest.partition(MARKS[1])
    return f"{before}{MARKS[0]}{mark}\n\n{table}\n\n{MARKS[1]}{after}"


def _is_interface(decorator: ast.expr) -> bool:
    return "use_experts_implementation" in ast.unparse(decorator)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    transformers.logging.set_verbosity_error()
    table = text() if not (options := parser.parse_args()).write else between_marks(DOC.read_text(), text())
    if options.write:
        DOC.write_text(table)
    else:
        print(table)


if __name__ == "__main__":
    main()
