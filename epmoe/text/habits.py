"""What a chat template does with the parts of a message, read from its syntax tree: see `Habits`.

Servers send the same message in several shapes: content as text or as a list of parts, a call's arguments as a JSON
text or as an object, reasoning under three names. A template is written for some of them, and garbles the others
without a word. Which ones it is written for, it shows by what it does with them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from jinja2 import nodes

REASONING = ("reasoning_content", "thinking", "reasoning")  # names of a message's reasoning, the commonest first

# What only a list has a use for, and what only an object has.
_OF_LISTS = {"batch", "first", "groupby", "last", "list", "map", "reject", "rejectattr", "select", "selectattr"}
_OF_OBJECTS = {"items", "dictsort", "tojson", "xmlattr"}


@dataclass(frozen=True)
class Habits:
    """Shapes that a template is written for; the defaults are those of a template that prints what it gets.

    Names are followed through `{% set %}`, loops and macros' parameters, wherever in the template these stand: too many
    are followed rather than too few.
    """

    reads_parts: bool = False  # goes over a list of content parts
    knows_parts: bool = field(default=False, compare=False)  # names the key or type `text`, which parts have
    reads_text: bool = True  # prints content that is text, too
    encodes_arguments: bool = False  # writes a call's arguments as JSON, or item by item: it wants an object
    tests_content: bool = False  # asks which of the two it is: each has a branch of its own
    prints_arguments: bool = True  # writes them as they are: it wants a text
    reasoning: frozenset[str] = frozenset()  # the names of REASONING that it reads

    @classmethod
    def of(cls, template: nodes.Template) -> "Habits":
        """Those of a parsed template."""
        content, arguments = _Uses.of(template, "content"), _Uses.of(template, "arguments")
        calls = _Uses.of(template, "tool_calls", elements=True), _Uses.of(template, "function")
        encodes = arguments.as_object or any(each.as_json for each in calls)  # within the whole call, too
        return cls(
            reads_parts=content.as_list,
            knows_parts="text" in _keys(template)
            or any(each.value == "text" for each in template.find_all(nodes.Const)),
            reads_text=content.tested_as_text or content.printed or not content.as_list,
            tests_content=content.tested_as_text,
            encodes_arguments=encodes,
            prints_arguments=arguments.tested_as_text or arguments.printed or not encodes,
            reasoning=frozenset(REASONING) & set(_keys(template)),
        )


@dataclass
class _Uses:
    """What a template does with a key of a message, under any name that the value gets."""

    as_list: bool = False
    as_object: bool = False
    as_json: bool = False
    tested_as_text: bool = False
    printed: bool = False

    @classmethod
    def of(cls, template: nodes.Template, key: str, *, elements: bool = False) -> "_Uses":
        """Of the value, and with `elements` of what a loop over it gives, too."""
        names = _names_of(template, key, elements)
        uses = cls()
        for node, parent in _with_parents(template):
            if _is_value(node, key, names):
                uses._note(node, parent)
            match node:
                case nodes.Getattr() | nodes.Getitem() if _key_of(node) in {"text", "type"}:  # content[0].text
                    uses.as_list |= isinstance(node.node, nodes.Getitem) and _is_value(node.node.node, key, names)
        return uses

    def _note(self, node: nodes.Node, parent: nodes.Node) -> None:
        match parent:
            case nodes.For() if parent.iter is node:
                self.as_list = self.as_object = True
            case nodes.Filter():
                self.as_list |= parent.name in _OF_LISTS
                self.as_json |= parent.name == "tojson"
                self.as_object |= parent.name in _OF_OBJECTS
                self.printed |= parent.name in {"string", "trim", "safe"}
            case nodes.Test():
                self.tested_as_text |= parent.name in {"string", "iterable", "sequence"}
            case nodes.Getattr():
                self.as_object |= parent.attr in {"items", "keys", "values"}
            case nodes.Output() | nodes.Concat() | nodes.Add():
                self.printed = True


def _names_of(template: nodes.Template, key: str, elements: bool) -> set[str]:
    """Variables that hold the value: those set to it, parameters that it is given for, and with `elements` loops'."""
    macros = {macro.name: macro for macro in template.find_all(nodes.Macro)}
    names: set[str] = set()
    while True:
        found = set(names)
        for node, _ in _with_parents(template):
            match node:
                case nodes.Assign(target=nodes.Name(name=name), node=value):
                    given = [(name, value)]
                case nodes.For(target=nodes.Name(name=name), iter=value) if elements:
                    given = [(name, value)]
                case nodes.Call(node=nodes.Name(name=name)) if name in macros:
                    given = [(to.name, value) for to, value in zip(macros[name].args, node.args, strict=False)]
                    given += [(each.key, each.value) for each in node.kwargs]
                case _:
                    continue
            found |= {name for name, value in given if _may_be_value(value, key, names)}
        if found == names:
            return names
        names = found


def _may_be_value(node: nodes.Node | None, key: str, names: set[str]) -> bool:
    """Whether an expression is the value, or one of two that a condition chooses from."""
    match node:
        case nodes.CondExpr():
            return _may_be_value(node.expr1, key, names) or _may_be_value(node.expr2, key, names)
        case nodes.Or():
            return _may_be_value(node.left, key, names) or _may_be_value(node.right, key, names)
        case nodes.Filter(name="default" | "d"):
            return _may_be_value(node.node, key, names)
    return node is not None and _is_value(node, key, names)


def _is_value(node: nodes.Node, key: str, names: set[str]) -> bool:
    return _key_of(node) == key or (isinstance(node, nodes.Name) and node.ctx == "load" and node.name in names)


def _key_of(node: nodes.Node) -> str | None:
    """The key that an expression reads: `message.key`, `message["key"]` or `message.get("key")`."""
    match node:
        case nodes.Getattr():
            return node.attr
        case nodes.Getitem(arg=nodes.Const(value=str(name))):
            return name
        case nodes.Call(node=nodes.Getattr(attr="get"), args=[nodes.Const(value=str(name)), *_]):
            return name
    return None


def _keys(template: nodes.Template) -> Iterator[str]:
    """All keys that a template reads of anything."""
    for node, _ in _with_parents(template):
        if (name := _key_of(node)) is not None:
            yield name


def _with_parents(root: nodes.Node) -> Iterator[tuple[nodes.Node, nodes.Node]]:
    """Every node below `root` with the one that it stands in; without recursion, for a template of any depth."""
    open_nodes = [root]
    while open_nodes:
        parent = open_nodes.pop()
        for node in parent.iter_child_nodes():
            yield node, parent
            open_nodes.append(node)
