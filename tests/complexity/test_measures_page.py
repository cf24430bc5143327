"""Tests that docs/measures.md says of every measure what the code says."""

import re
from pathlib import Path

import pytest

from robustdyn.complexity import MEASURES

PAGE = (Path(__file__).parents[2] / "docs" / "measures.md").read_text()
LETTERS = {"relu_rescaling": "R", "batchnorm_scale": "B"}


def rows():
    """The cells of each measure's row."""
    found = {}
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if cells:
            found |= dict.fromkeys(re.findall(r"`(\w+)`", cells[0]), cells)
    return found


def test_the_page_has_a_row_for_each_measure_and_no_other():
    assert set(rows()) == set(MEASURES)


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_row(measure):
    cells = rows()[measure.name]
    assert set(cells[5].replace(",", "").split()) == {LETTERS[kind] for kind in measure.invariances}
    assert ("(a search)" in cells[0]) == measure.searches
    author = re.split(r"[ ,]", measure.source)[0]
    assert author in cells[2] or measure.source == "docs/theory.md"
