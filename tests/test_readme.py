"""What the README prints is what happens."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from robustdyn.analysis.study import names
from robustdyn.entrypoints.config import check, config_dir
from tests.runs import compose

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_snippet_prints_what_it_says():
    code, output = re.search(r"```python\n(.*?)```\s+```text\n(.*?)```", README, re.DOTALL).groups()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    assert printed.getvalue() == output


def commands():
    blocks = re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("robustdyn-train")]
    return [shlex.split(line, comments=True)[1:] for line in lines]


@pytest.mark.parametrize("arguments", commands(), ids=" ".join)
def test_every_command_composes(arguments):
    given = [argument for argument in arguments if not argument.startswith("-")]
    overrides = OverridesParser.create().parse_overrides(given)
    first_job = [
        f"{o.get_key_element()}={next(o.sweep_string_iterator())}" if o.is_sweep_override() else o.input_line
        for o in overrides
    ]
    check(compose(*first_job))


@pytest.mark.parametrize("target", re.findall(r"(?m)^make (\w[\w-]*)", README))
def test_every_make_target_exists(target):
    verb, _, study = target.partition("-")
    if verb == "reproduce":  # a pattern, of any study that has an experiment
        assert study in names()
        assert (config_dir() / "experiment" / f"{study}.yaml").is_file()
        target = "reproduce-%"
    assert re.search(rf"(?m)^{target}:", (ROOT / "Makefile").read_text())


@pytest.mark.parametrize("study", names())
def test_every_study_has_its_runs_and_its_page(study):
    assert (config_dir() / "experiment" / f"{study}.yaml").is_file()
    page = (ROOT / "experiments" / study / "README.md").read_text()
    assert f"robustdyn-study {study} " in page
    assert f"`{study}`" in (ROOT / "docs" / "studies.md").read_text()


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http)([^)#]+)", README))
def test_every_link_leads_somewhere(link):
    assert (ROOT / link).exists()
