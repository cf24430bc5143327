import re
import subprocess
import sys
from pathlib import Path

import robustdyn.theory

SOURCES = sorted(Path(robustdyn.theory.__file__).parent.glob("*.py"))
DOCS = Path(__file__).parents[2] / "docs" / "theory.md"


def test_importing_the_theory_needs_neither_torch_nor_lightning():
    code = "import robustdyn.theory, sys; print(sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "numpy" in loaded
    assert not {"torch", "lightning", "hydra", "pandas"} & set(re.findall(r"'(\w+)'", loaded))


def test_every_cited_equation_is_in_the_docs_and_every_number_is_used_once():
    tags = [int(n) for n in re.findall(r"\\tag\{(\d+)\}", DOCS.read_text(encoding="utf-8"))]
    assert tags == list(range(1, len(tags) + 1))
    cited = set()
    for source in SOURCES:
        text = source.read_text(encoding="utf-8")
        for phrase in re.findall(r"[Ee]quations?\s+((?:\(\d+\)(?:,\s|\sto\s|\sand\s)?)+)", text):
            cited |= {int(n) for n in re.findall(r"\d+", phrase)}
    assert cited
    assert cited <= set(tags)


def test_every_public_name_is_documented_with_its_source_or_raises():
    for name in robustdyn.theory.__all__:
        text = getattr(robustdyn.theory, name).__doc__
        assert text
        assert len(text) > 60
