"""docs/from_compile_to_kernel.md shows the graphs that the compiler makes today."""

from __future__ import annotations

import pytest

from tests.golden.generate_graphs import PAGE, render


def test_the_page_is_what_the_command_makes() -> None:
    """Also of a page that shows something else, so that no text between the markers is taken over."""
    page = PAGE.read_text()
    outdated = page.replace("= tqai.extend(", "= tqai.append(").replace("is_causal=is_causal", "is_causal=True")
    assert outdated != page
    assert render(outdated) == page, "run python tests/golden/generate_graphs.py"


def test_a_page_without_a_section_is_refused() -> None:
    page = PAGE.read_text().replace("<!-- graphs:begin decode -->", "")
    with pytest.raises(ValueError, match="must have sections step, prefill, decode"):
        render(page)
