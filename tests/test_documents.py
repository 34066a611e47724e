"""README.md and docs/: tables are those of the results, and the files and modules that they name exist."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]


@pytest.fixture
def readme(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("readme")


def is_module(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # what is before the last dot is no package
        return False


def run_script(root, *arguments):
    command = [sys.executable, root / "benchmarks" / "readme.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_documents_are_what_the_script_makes_of_the_results():
    result = run_script(ROOT, "--check")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("document", ["README.md", "docs/results.md", "docs/performance.md"])
def test_a_changed_figure_is_noticed_and_written_anew(tmp_path, document):
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "README.md", tmp_path)
    path, committed = tmp_path / document, (ROOT / document).read_text()
    path.write_text(re.sub(r"(\| [\d.,]+) \|$", r"\g<1>9 |", committed, count=1, flags=re.MULTILINE))
    assert path.read_text() != committed
    result = run_script(tmp_path, "--check")
    assert result.returncode == 1 and document in result.stderr
    assert run_script(tmp_path).returncode == 0
    assert path.read_text() == committed


def test_readme_has_one_table_of_quality_and_one_of_speed(readme):
    text = (ROOT / "README.md").read_text()
    assert [name for _, name, _ in readme.BLOCK.findall(text)] == ["quality", "generate"]


def test_each_result_is_a_table_of_one_document_besides_the_readme(readme):
    pages = [readme.render(document, (ROOT / document).read_text()) for document in readme.DOCUMENTS if "/" in document]
    for result in readme.results():
        provenance = f"`{result['command']}`, {result['date']}"
        assert sum(page.count(provenance) for page in pages) == 1, result["name"]


def test_a_result_that_no_document_names_is_shown_with_all_fields(readme, monkeypatch):
    unknown = readme.results()[0] | {"name": "unknown", "rows": [{"first_field": 1, "other": "text", "deep": [1]}]}
    monkeypatch.setattr(readme, "results", lambda: [unknown])
    page = readme.render(readme.RESULTS_PAGE, "")
    assert "## Unknown\n\n| first field | other |\n| --- | --- |\n| 1 | text |" in page


@pytest.mark.parametrize(
    "text",
    ["", "<!-- results:begin quality -->\n", "<!-- results:begin other -->\n<!-- results:end -->"],
    ids=["none", "without an end", "another"],
)
def test_missing_markers_are_an_error(readme, text):
    with pytest.raises(ValueError, match=r"README.md must have .* quality, generate"):
        readme.render("README.md", text)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_paths_lead_somewhere(document):
    path = ROOT / document
    text = path.read_text()
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (path.parent / link).exists(), link
    for name in re.findall(r"\b(?:tqc|passes|lowering|benchmarks|tests|docs)/[\w/]+\.(?:py|md|h|cpp|png)\b", text):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("document", DOCUMENTS)
def test_modules_and_functions_that_are_named_exist(document):
    for name in re.findall(r"`(tqc(?:\.\w+)+)", (ROOT / document).read_text()):
        module, _, attribute = name.rpartition(".")
        if not is_module(name):
            assert hasattr(importlib.import_module(module), attribute), name
