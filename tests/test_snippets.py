"""Tests that what the README and the documentation tell the reader to run works as they say."""

import ast
import contextlib
import inspect
import io
import re
import shlex
from pathlib import Path

import hydra
import numpy as np
import pytest
import torch
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

import robustdyn
from robustdyn.commands.replicas import main as replicate
from robustdyn.commands.report import main as report
from robustdyn.defaults import config_dir
from robustdyn.run.config import check
from robustdyn.studies import names
from tests.runs import TINY, command, compose, invoke
from tests.test_docs import REFERENCE

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
}
WITH_TESTS_OF_THEIR_OWN = {"docs/extending.md"}
GENERATED = {"configuration.md"} | {f"reference/{name}.md" for name in REFERENCE}
TRAINED = (
    *(o for o in TINY if not o.startswith(("measure.epochs", "schedule.", "trainer.max_epochs"))),
    "trainer.max_epochs=1",
    "measure.epochs=[0]",
    "report=false",
    "schedule=constant",
)
ENSEMBLE = (
    "device=cpu",
    "replicas=4",
    "chunk=4",
    "steps=4",
    "learning_rate=0.01",
    "record.steps=[0,2,4]",
    "record.loss_steps=[4]",
    "record.loss_examples=20",
    "sampling.replacement=true",
    "start.eigenvectors=2",
    "start.noise_batches=4",
    "start.tolerance=1e-2",
)


def blocks(language, page):
    if page in WITH_TESTS_OF_THEIR_OWN:
        return []
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A run with measurements, and an ensemble that starts at its end."""
    directory = tmp_path_factory.mktemp("documented") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert command(monkeypatch, *TRAINED, f"hydra.run.dir={directory}") == 0
        checkpoint = f"checkpoint={directory / 'checkpoints' / 'last.ckpt'}"
        assert invoke(replicate, monkeypatch, checkpoint, *ENSEMBLE) == 0
    return directory


@pytest.fixture
def given(run):
    """The names that a page's snippets take from the text around them."""
    torch.manual_seed(0)
    return {
        "run": run,
        "model": torch.nn.Linear(10, 3).double(),
        "inputs": 3 * torch.randn(400, 10, dtype=torch.float64),
        "targets": torch.arange(400) % 3,
        "train_examples": 400,
        "batch_size": 8,
    }


def pages_with_python():
    slow = ("docs/tutorials/measure_your_model.md", "docs/tutorials/your_own_loop.md")
    marks = {page: [pytest.mark.slow] for page in slow}
    return [pytest.param(page, marks=marks.get(page, ())) for page in PAGES if blocks("python", page)]


@pytest.mark.parametrize("page", pages_with_python())
def test_snippets_run_and_print_what_the_page_says(page, given, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for code, output in re.findall(r"```python\n(.*?)```(?:\s+```text\n(.*?)```)?", PAGES[page], re.DOTALL):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, page, "exec"), given)
        assert printed.getvalue() == output or not output
    for line in console_lines(page):
        if line.startswith("robustdyn-report ") and Path(line.split()[1]).is_dir():
            assert report(line.split()[1:]) == 0


def test_the_stationary_variance_of_the_curvature_page(given):
    """The recipe agrees with momentum SGD on mini-batches of the same gradients in the same quadratic."""
    exec(compile(blocks("python", "docs/curvature.md")[0], "docs/curvature.md", "exec"), given)
    model, inputs, targets = given["model"], given["inputs"], given["targets"]
    slopes = (model(inputs).softmax(dim=1) - torch.nn.functional.one_hot(targets)).detach()
    gradients = torch.cat([(slopes[:, :, None] * inputs[:, None, :]).flatten(1), slopes], dim=1).numpy()
    noise = (gradients - gradients.mean(axis=0)) @ given["top"].eigenvectors.numpy()
    curvature = given["top"].eigenvalues.numpy() + 5e-4
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
    np.testing.assert_allclose(np.mean(seen, axis=0), given["variances"], rtol=0.05)


def test_the_settings_of_the_new_perturbation_are_its_arguments():
    (settings,) = blocks("yaml", "docs/contributing.md")
    code = blocks("python", "docs/contributing.md")[0]
    defined = {}
    exec(compile(code, "docs/contributing.md", "exec"), defined)
    given = yaml.safe_load(settings)
    made = defined[given.pop("_target_").rpartition(".")[2]]
    assert set(given) == set(inspect.signature(made).parameters)


def console_lines(page):
    joined = "".join(blocks("bash", page)).replace("\\\n", " ")
    return [part.strip() for line in joined.splitlines() for part in line.split(" #")[0].split(";")]


def commands(*programs):
    """The arguments of each of these programs on any page, each line once."""
    found = {}
    for page in PAGES:
        for line in console_lines(page):
            words = shlex.split(line)
            called = [word for word in words if word.rpartition("/")[2] in programs]
            if called:
                found[tuple(words[words.index(called[0]) :])] = page
    return [pytest.param(list(words), id=" ".join(words)) for words in found]


HYDRA = (
    "robustdyn-train",
    "robustdyn-evaluate",
    "robustdyn-replicas",
    "robustdyn-certify",
    "robustdyn-measure",
)


@pytest.mark.parametrize("words", commands(*HYDRA, "robustdyn.commands.train"))
def test_every_command_composes(words):
    """With the first value of each setting that is swept, and the rules that a run must keep."""
    name = words[0].replace("robustdyn.commands.", "robustdyn-").removeprefix("robustdyn-")
    arguments = [word for word in words[1:] if not word.startswith("-")]
    overrides = OverridesParser.create().parse_overrides(arguments)
    first_job = [
        f"{o.get_key_element()}={next(o.sweep_string_iterator())}" if o.is_sweep_override() else o.input_line
        for o in overrides
    ]
    if name == "train":
        check(compose(*first_job))
        return
    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        assert hydra.compose(name, first_job).checkpoint


@pytest.mark.parametrize("words", commands("robustdyn-study"))
def test_every_study_on_a_command_line_exists(words):
    assert words[1] in names()


def targets():
    lines = [line.split() for page in PAGES for line in console_lines(page) if line.startswith("make ")]
    return sorted({target for line in lines for target in line[1:]})


@pytest.mark.parametrize("target", targets())
def test_every_make_target_exists(target):
    verb, _, study = target.partition("-")
    if verb == "reproduce":  # a pattern, of any study that has an experiment
        assert study in names()
        assert (config_dir() / "experiment" / f"{study}.yaml").is_file()
        target = "reproduce-%"
    assert re.search(rf"(?m)^{target}:", (ROOT / "Makefile").read_text())


@pytest.mark.parametrize("study", names())
def test_every_study_has_its_runs_and_its_page(study):
    """The runs are those of an experiment, or imported."""
    trained = (config_dir() / "experiment" / f"{study}.yaml").is_file()
    assert trained == (study != "published")
    page = (ROOT / "experiments" / study / "README.md").read_text()
    assert f"robustdyn-study {study} " in page
    assert trained or "`robustdyn-import " in page
    assert f"`{study}`" in (ROOT / "docs" / "studies.md").read_text()


def said():
    """The messages in the source, with dots for what is filled in."""
    package = Path(robustdyn.__file__).parent
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "…" for p in node.values]
                yield "".join(map(str, parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


SAID = "\n".join(said())
OURS = re.findall(r"\*\*`([^`]+)`\*\*", PAGES["docs/errors.md"].replace("\n", " "))


@pytest.mark.parametrize("message", OURS)
def test_every_message_is_one_of_ours(message):
    """Each part between dots stands in the source; a message may be put together from several strings."""
    parts = [part.strip(" :;(),=") for part in message.split("…")]
    assert max(map(len, parts)) > 8
    assert [part for part in parts if part not in SAID] == []


@pytest.mark.parametrize(
    ("page", "link"),
    [(page, link) for page in PAGES for link in re.findall(r"\]\((?!http)([^)#]+)", PAGES[page])],
)
def test_every_link_leads_somewhere(page, link):
    """To a file, or to a page that the site generates."""
    target = ((ROOT / page).parent / link).resolve().relative_to(ROOT)
    assert (ROOT / target).exists() or target.as_posix().removeprefix("docs/") in GENERATED
