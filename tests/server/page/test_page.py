"""The page's files: served to anyone, with a policy, and without what the policy forbids."""

import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from email.message import Message
from pathlib import Path

import pytest
from told import told

from epmoe.engine.figures import Figures
from epmoe.server import page
from epmoe.server.frames import Load
from epmoe.server.metrics import Metrics

FOLDER = Path(page.__file__).parent
HTML, CSS, SCRIPT, ICON = ((FOLDER / name).read_text() for name in ("index.html", "page.css", "page.js", "page.svg"))


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with told(tmp_path_factory.mktemp("page"), {}, key="secret") as address:
        yield address


def got(url: str) -> tuple[int, bytes, Message]:
    try:
        with urllib.request.urlopen(url, timeout=100) as found:
            return found.status, found.read(), found.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read(), error.headers


@pytest.mark.parametrize(("path", "name", "kind"), [(path, *file) for path, file in page.FILES.items()])
def test_a_file_is_served_without_a_key(at: str, path: str, name: str, kind: str) -> None:
    status, data, headers = got(at + path)
    assert (status, data, headers["content-type"]) == (200, (FOLDER / name).read_bytes(), kind)
    assert headers["content-security-policy"] == page.POLICY and headers["x-content-type-options"] == "nosniff"


def test_what_it_asks_for_needs_the_key(at: str) -> None:
    assert [got(at + path)[0] for path in ("/v1/models", "/metrics", "/page", "/page/page.js")] == [401] * 4


def test_the_policy_allows_only_itself() -> None:
    rules = dict(rule.split(" ", 1) for rule in page.POLICY.split("; "))
    assert rules["default-src"] == rules["frame-ancestors"] == rules["base-uri"] == "'none'"
    assert set(rules.values()) == {"'none'", "'self'", "'script'"}
    assert rules["require-trusted-types-for"] == "'script'" and rules["trusted-types"] == "'none'"


def test_no_text_becomes_markup_or_code() -> None:
    """The policy forbids it; this holds in browsers that do not know trusted types, too."""
    forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|\bFunction\(|srcdoc|DOMParser|\.href"
    assert not re.search(forbidden, SCRIPT)
    assert re.findall(r"<script\b[^>]*>", HTML) == ['<script type="module" src="page.js">']
    assert not re.search(r"\son\w+=|\sstyle=|<style|javascript:", HTML)
    assert "localStorage" not in SCRIPT and "document.cookie" not in SCRIPT


def test_nothing_comes_from_elsewhere() -> None:
    assert not re.search(r"https?:|//\w", HTML + CSS) and "@import" not in CSS and "url(" not in CSS
    assert not re.search(r"https?:", SCRIPT)
    assert re.findall(r"https?:[^\"]*", ICON) == ["http://www.w3.org/2000/svg"]  # a name, which nobody fetches
    assert {path for path in re.findall(r'(?:href|src)="([^"]*)"', HTML)} == {
        name for name, _ in page.FILES.values() if name != "index.html"
    }


def test_script_and_markup_name_the_same() -> None:
    ids = set(re.findall(r'\bid="(\w+)"', HTML))
    used = set(re.findall(r'\$\("(\w+)"\)', SCRIPT)) | set(re.findall(r"#(\w+)\b(?=[^;}]*{)", CSS))
    assert used <= ids and ids - used <= {"figures"}
    fields = set(re.findall(r'\bname="(\w+)"', HTML)) - {"viewport"}
    assert fields == {"system", "temperature", "max_tokens", "reasoning_effort", "tools", "key"}
    assert all(re.search(rf"\b{name}\b", SCRIPT) for name in fields)


def test_its_figures_are_among_the_metrics() -> None:
    metrics = Metrics("m", lambda: Load([Figures(0, 0, 0, 0, 0, 1, 1, 0, 0.0)]))
    shown = re.findall(r"^(epmoe_\w+) (\S+)$", metrics.text().decode(), re.MULTILINE)
    used = set(re.findall(r"\bepmoe_\w+", SCRIPT.replace(r"epmoe_\w", "")))
    assert len(used) == 7 and used <= {name for name, _ in shown}
