"""The tables of docs/transformers.md are what scripts/families.py says of the installed release."""

import pytest
import transformers

if tuple(int(number) for number in transformers.__version__.split(".")[:2]) < (5, 23):
    pytest.skip("an older release", allow_module_level=True)

from transformers.models.gemma4.modeling_gemma4 import Gemma4TextExperts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from scripts import families


@pytest.mark.parametrize("experts_class", [GptOssExperts, Qwen3MoeExperts, NemotronHExperts, Gemma4TextExperts])
def test_rows_of_the_page(experts_class: type) -> None:
    row = families.row(experts_class.__module__.split(".")[2], experts_class)
    assert f"\n{row}\n" in families.DOC.read_text(encoding="utf-8")
    assert row.fits is row.parallel is (experts_class in (GptOssExperts, Qwen3MoeExperts))


def test_the_release() -> None:
    assert f"\nWith transformers {transformers.__version__} " in families.DOC.read_text(encoding="utf-8")


def test_something_else_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A class whose forward is not what its gate and its flags say is found."""

    class Doubled(Qwen3MoeExperts):
        def forward(self, *given: object) -> object:
            return 2 * super().forward(*given)

    monkeypatch.setattr(Doubled, "__module__", Qwen3MoeExperts.__module__)
    row = families.row("qwen3_moe", Doubled)
    assert not row.fits and row.what.startswith("computes something else")


def test_it_is_written_between_the_marks() -> None:
    document = f"before\n{families.MARKS[0]} -->\nold\n{families.MARKS[1]}\nafter\n"
    written = families.between_marks(document, "new")
    assert written == f"before\n{families.MARKS[0]} -->\n\nnew\n\n{families.MARKS[1]}\nafter\n"
    assert families.between_marks(written, "new") == written


@pytest.mark.slow
def test_the_whole_table() -> None:
    document = families.DOC.read_text(encoding="utf-8")
    assert families.between_marks(document, families.text()) == document
