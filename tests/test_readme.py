"""Tests that the README's commands and recipes work as it says."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser

from robustdyn.run.config import check, config_dir
from robustdyn.studies import names
from tests.runs import compose

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CURVATURE = (ROOT / "docs" / "curvature.md").read_text()


def test_the_snippet_prints_what_it_says():
    code, output = re.search(r"```python\n(.*?)```\s+```text\n(.*?)```", README, re.DOTALL).groups()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    assert printed.getvalue() == output


def test_the_stationary_variance_of_the_curvature_page():
    """The recipe agrees with momentum SGD on mini-batches of the same gradients in the same quadratic."""
    torch.manual_seed(0)
    model = torch.nn.Linear(10, 3).double()
    inputs, targets = 3 * torch.randn(400, 10, dtype=torch.float64), torch.arange(400) % 3
    code = re.search(r"```python\n(.*?)```", CURVATURE, re.DOTALL).group(1)
    names = {"model": model, "inputs": inputs, "targets": targets, "train_examples": 400, "batch_size": 8}
    exec(compile(code, "docs/curvature.md", "exec"), names)
    predicted = names["variances"]

    slopes = (model(inputs).softmax(dim=1) - torch.nn.functional.one_hot(targets)).detach()
    gradients = torch.cat([(slopes[:, :, None] * inputs[:, None, :]).flatten(1), slopes], dim=1).numpy()
    noise = (gradients - gradients.mean(axis=0)) @ names["top"].eigenvectors.numpy()
    curvature = names["top"].eigenvalues.numpy() + 5e-4
    draws, chains = np.random.default_rng(0), 2000
    x, v, seen = np.zeros((chains, 10)), np.zeros((chains, 10)), []
    for step in range(1, 701):
        # of one permutation 50 chains get a batch each: within a chain the steps stay independent
        order = draws.permuted(np.tile(np.arange(400), (chains // 50, 1)), axis=1).reshape(chains, 8)
        v = 0.9 * v + curvature * x + noise[order].mean(axis=1)
        x = x - 0.1 * v
        if step > 300 and step % 50 == 0:
            seen.append((x**2).mean(axis=0))
    # 8 times 2000 nearly independent squares of nearly normal numbers: a standard error of 1.1 %
    np.testing.assert_allclose(np.mean(seen, axis=0), predicted, rtol=0.05)


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
