"""Which variables a chat template reads that somebody may give it, from its syntax tree.

A name that the template sets on every way to where it reads it is none: giving it would change nothing. jinja's own
list has such names too, if they are set under a condition.
"""

from collections.abc import Iterable

from jinja2 import nodes

Names = frozenset[str]

_IN_MACROS = frozenset({"caller", "kwargs", "varargs"})


def read_names(template: nodes.Template, known: Iterable[str]) -> Names:
    """The names that a parsed template reads before it has set them; `known` are those that it has anyway."""
    reader = _Reader()
    reader.block(template.body, frozenset({*known, "self"}))
    return frozenset(reader.found)


class _Reader:
    """Goes through statements in their order with the names that are bound by then, and finds those that are not."""

    def __init__(self) -> None:
        self.found: set[str] = set()

    def block(self, body: Iterable[nodes.Node], bound: Names) -> Names:
        """Statements one after the other; the names that are bound after them."""
        for node in body:
            bound = self._statement(node, bound)
        return bound

    def _statement(self, node: nodes.Node, bound: Names) -> Names:
        match node:
            case nodes.Assign():
                self._read(node.node, bound)
                return bound | self._targets(node.target, bound)
            case nodes.AssignBlock():
                self._read(node.filter, bound)
                self.block(node.body, bound)
                return bound | self._targets(node.target, bound)
            case nodes.If():
                return self._if(node, bound)
            case nodes.For():
                self._for(node, bound)
            case nodes.Macro():
                self._called(node, bound | {node.name})  # it may call itself
                return bound | {node.name}
            case nodes.CallBlock():
                self._read(node.call, bound)
                self._called(node, bound)
            case nodes.With():
                for value in node.values:
                    self._read(value, bound)
                self.block(node.body, bound.union(*(self._targets(each, bound) for each in node.targets)))
            case nodes.FilterBlock():
                self._read(node.filter, bound)
                self.block(node.body, bound)
            case nodes.Block() | nodes.Scope() | nodes.ScopedEvalContextModifier():
                self.block(node.body, bound)
            case _:
                self._read(node, bound)
        return bound

    def _if(self, node: nodes.If, bound: Names) -> Names:
        """What all branches bind."""
        ends = []
        for branch in (node, *node.elif_):
            self._read(branch.test, bound)
            ends.append(self.block(branch.body, bound))
        return frozenset.intersection(*ends, self.block(node.else_, bound))

    def _for(self, node: nodes.For, bound: Names) -> None:
        """A loop binds nothing for what comes after it."""
        self._read(node.iter, bound)
        inside = bound | self._targets(node.target, bound) | {"loop"}
        self._read(node.test, inside)
        self.block(node.body, inside)
        self.block(node.else_, bound)

    def _called(self, node: nodes.Macro | nodes.CallBlock, bound: Names) -> None:
        for default in node.defaults:
            self._read(default, bound)
        self.block(node.body, bound | {each.name for each in node.args} | _IN_MACROS)

    def _targets(self, target: nodes.Node, bound: Names) -> Names:
        """The names that an assignment binds; that to a namespace's attribute reads the namespace."""
        every = (target, *target.find_all((nodes.Name, nodes.NSRef)))
        self.found |= {each.name for each in every if isinstance(each, nodes.NSRef)} - bound
        return frozenset(each.name for each in every if isinstance(each, nodes.Name))

    def _read(self, node: nodes.Node | None, bound: Names) -> None:
        if node is not None:
            every = (node, *node.find_all(nodes.Name))
            self.found |= {each.name for each in every if isinstance(each, nodes.Name) and each.ctx == "load"} - bound
