"""Names of tables, and classes from outside the repository in their stead: every mistake is told in one line."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from epmoe.errors import UserError
from epmoe.moe.experts import EXPERTS, Experts
from epmoe.moe.experts.reference import ReferenceExperts
from epmoe.tables import lookup

OUTSIDE = """
from dataclasses import dataclass
from typing import ClassVar

from epmoe.moe.experts import Experts
from epmoe.moe.experts.reference import ReferenceExperts


class Whole(ReferenceExperts):
    pass


class Holder:
    Whole = Whole


class Empty:
    pass


class Inherits(Experts):  # whose methods do nothing
    formats = frozenset()
    waits = True

    @property
    def nbytes(self):
        return 0


@dataclass
class Fields:
    nbytes: int  # of an instance: enough
    formats: ClassVar[frozenset[str]]  # of the class, without a value

    serves = distinct = pack = unpack = forward = None
    waits: ClassVar[bool] = False


def function():
    pass


number = 3
"""


@dataclass(frozen=True)
class Mistake:
    name: str
    says: str

    def __str__(self) -> str:
        return self.name


MISTAKES = [
    Mistake("fast", r"experts='fast' is unknown; known: triton, hub, reference, or package\.module:Class"),
    Mistake("outside.Whole", r"experts='outside\.Whole' is unknown; known: .* or package\.module:Class"),
    Mistake(
        "nowhere.at_all:X", r"nowhere\.at_all cannot be imported \(No module named 'nowhere'\): give .* PYTHONPATH"
    ),
    Mistake("broken:X", r"broken cannot be imported \(No module named 'missing_from_it'\)"),
    Mistake(":X", r"experts=':X': .* cannot be imported"),
    Mistake(".outside:X", r"experts='\.outside:X': .* cannot be imported"),
    Mistake("outside:Absent", r"outside has no class Absent: give the name of a class in it"),
    Mistake("outside:", r"outside has no class"),
    Mistake("outside:Holder.Absent", r"outside has no class Holder\.Absent"),
    Mistake("outside:function", r"outside has function, not a class, function: give"),
    Mistake("outside:number", r"outside has int, not a class, number: give"),
    Mistake(
        "outside:Empty",
        r"Empty lacks distinct, formats, forward, nbytes, pack, serves, unpack, waits of epmoe\.moe\.experts\.Experts, "
        r"the contract of such a class: add them",
    ),
    Mistake("outside:Inherits", r"Inherits lacks distinct, forward, pack, serves, unpack of "),
    Mistake("outside:Fields", r"Fields lacks formats of .*: add it$"),
]


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "outside.py").write_text(OUTSIDE)
    (tmp_path / "broken.py").write_text("import missing_from_it\n")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("outside")
@pytest.mark.parametrize("mistake", MISTAKES, ids=str)
def test_mistakes(mistake: Mistake) -> None:
    with pytest.raises(UserError, match=mistake.says) as caught:
        lookup("experts", EXPERTS, mistake.name, Experts)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("outside")
def test_a_class_from_outside() -> None:
    for name in ("Whole", "Holder.Whole"):
        found = lookup("experts", EXPERTS, f"outside:{name}", Experts)
        assert found.__name__ == "Whole" and issubclass(found, ReferenceExperts)


@pytest.mark.usefixtures("outside")
def test_only_keys_with_a_contract_allow_it() -> None:
    with pytest.raises(UserError, match=r"router='outside:Whole' is unknown; known: [\w, ]+$"):
        lookup("router", {"a": "b:c", "d": "e:f"}, "outside:Whole")


def test_names_of_the_table_need_no_check() -> None:
    assert lookup("experts", EXPERTS, "reference", Experts) is ReferenceExperts
