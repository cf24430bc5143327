"""The effect of half precision on one checkpoint, against a plain rendering and SciPy."""

import importlib
import json
import math
import sys
from contextlib import nullcontext
from pathlib import Path

import hydra
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from robustdyn.data import Batch
from robustdyn.defaults import config_dir
from robustdyn.errors import UserError
from robustdyn.evaluation import Ball
from robustdyn.records import find_runs
from robustdyn.run.config import build, check
from tests.records.synthetic import config, write_hydra
from tests.runs import command, compose, tiny_but
from tests.tolerances import EXACT64

EXPERIMENT = Path(__file__).parents[2] / "experiments" / "precision"


@pytest.fixture
def script(monkeypatch):
    """Imports one of the experiment's scripts by name."""
    monkeypatch.syspath_prepend(str(EXPERIMENT))
    yield importlib.import_module
    sys.modules.pop("effect", None)


def test_paired_accuracies_are_those_of_the_examples(script):
    effect = script("effect")
    draws = np.random.default_rng(0)
    first, second = draws.random(400) < 0.6, draws.random(400) < 0.65
    pairs = effect.Pairs.of(torch.tensor(first), torch.tensor(second))
    apart = second.astype(float) - first
    assert pairs.examples == 400
    assert pairs.first == first.sum()
    assert pairs.second == second.sum()
    assert pairs.difference == pytest.approx(apart.mean(), **_relative(EXACT64))
    assert pairs.se == pytest.approx(apart.std() / math.sqrt(400), **_relative(EXACT64))
    exact = 2 * min(stats.binom.cdf(k, pairs.lost + pairs.gained, 0.5) for k in (pairs.lost, pairs.gained))
    assert pairs.p_value == pytest.approx(min(1.0, exact), rel=1e-8)
    halves = [effect.Pairs.of(*map(torch.tensor, (first[s], second[s]))) for s in np.split(np.arange(400), 2)]
    assert effect.Pairs.total(halves) == pairs
    same = effect.Pairs.of(torch.tensor(first), torch.tensor(first))
    assert (same.difference, same.se, same.p_value) == (0.0, 0.0, 1.0)


def _relative(tolerance):
    return {"rel": tolerance["rtol"], "abs": tolerance["atol"]}


def test_agreement_of_known_gradients(script):
    effect = script("effect")
    first = torch.tensor([[3.0, -4.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0]]).view(2, 1, 2, 2)
    second = torch.tensor([[3.0, 4.0, 0.0, -1.0], [7.0, 0.0, 0.0, 0.0]]).view(2, 1, 2, 2)
    same, cosine = effect.agreement(first, second)
    assert same.tolist() == [0.5, 1.0]
    assert cosine.tolist() == pytest.approx([(9 - 16 - 1) / 26, 1.0], rel=1e-6)


# long enough, and a ball small enough, that some examples withstand the attack and some do not
SETTINGS = (
    *tiny_but("measure.", "schedule.", "trainer.max_epochs"),
    "data.eval_batch_size=25",
    "attack.eps_255=12.75",
    "trainer.max_epochs=12",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of ``robustdyn-train``."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        assert command(patch, *SETTINGS, "measure=none", "report=false", f"hydra.run.dir={folder}") == 0
    return folder


def problem(run):
    """The run's last network, put together by hand, its test images in batches, and the attack."""
    cfg = compose(*SETTINGS)
    data, model = build(cfg, "data"), build(cfg, "model")
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    model.load_state_dict({k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")})
    model.eval()
    batches = list(data.test_dataloader())
    evaluator = build(compose_evaluation(), "pgd20")
    return model, batches, evaluator.pgd(Ball("linf", cfg.attack.eps_255 / 255))


def compose_evaluation():
    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        return hydra.compose("evaluate", ["evaluation=quick"]).evaluation.attacks


def half(on):
    return torch.autocast("cpu", torch.bfloat16, enabled=on)


def gradient(model, x, y, on):
    x = x.clone().requires_grad_(True)
    with half(on):
        loss = F.cross_entropy(model(x), y, reduction="sum")
    return torch.autograd.grad(loss, x)[0]


def rendering(model, x, y, start, on):
    """PGD-20 written out: images after 10 and after 20 steps; in the ball of ``SETTINGS``."""
    images, current = [], start.clone()
    for _ in range(20):
        current = current + 0.0125 * gradient(model, current, y, on).sign()
        current = torch.min(torch.max(current, x - 0.05), x + 0.05).clamp(0, 1)
        images.append(current)
    return images[9], images[19]


@pytest.mark.slow  # a run of its own
def test_effect_equals_a_plain_rendering(run, script):
    effect = script("effect")
    model, batches, pgd = problem(run)
    assert (pgd.eps, pgd.step_size, pgd.steps) == pytest.approx((0.05, 0.0125, 20))
    found = effect.measure(model, batches, pgd, seed=3)
    gradients = effect.compare_gradients(model, batches, pgd, seed=3)

    wanted: dict[str, list[torch.Tensor]] = {}
    for index, (x, y, _) in enumerate(batches):
        starts = [
            effect.starting_point(pgd, Batch(x, y, y), 3, index, stream)
            for stream in ("precision", "precision-again")
        ]
        assert not torch.equal(*starts)
        parts = {"sign": [], "cosine": []}
        for one, other in zip(
            gradient(model, starts[0], y, False), gradient(model, starts[0], y, True), strict=True
        ):
            parts["sign"].append(float((one.sign() == other.sign()).double().mean()))
            product = (one.double() * other.double()).sum()
            parts["cosine"].append(float(product / one.double().norm() / other.double().norm()))
        made = {
            "float32": rendering(model, x, y, starts[0], False),
            "bfloat16": rendering(model, x, y, starts[0], True),
            "float32, another start": rendering(model, x, y, starts[1], False),
        }
        with torch.no_grad():
            for attack, (halfway, end) in made.items():
                parts[f"loss {attack}"] = F.cross_entropy(model(halfway), y, reduction="none").tolist()
                for name, on in (("float32", False), ("bfloat16", True)):
                    with half(on):
                        parts[f"{attack} / {name}"] = (model(end).argmax(1) == y).tolist()
            for name, on in (("float32", False), ("bfloat16", True)):
                with half(on):
                    parts[f"clean {name}"] = (model(x).argmax(1) == y).tolist()
            with half(True):
                ordered = model(made["bfloat16"][1]).sort(1).values
            parts["tied"] = (ordered[:, -1] == ordered[:, -2]).tolist()
        for name, part in parts.items():
            wanted.setdefault(name, []).extend(part)

    assert found.keys() | gradients.keys() == wanted.keys()
    for name, values in (found | gradients).items():
        if name.startswith(("loss", "cosine", "sign")):
            # a step more or less where a float32 gradient is 0 but for rounding moves single pixels
            torch.testing.assert_close(values, torch.tensor(wanted[name]).double(), rtol=1e-3, atol=1e-4)
        else:
            assert values.tolist() == wanted[name], name
    assert 0.5 < gradients["sign"].mean() < 1  # bfloat16 was on
    assert not torch.equal(found["loss bfloat16"], found["loss float32"])
    assert 0 < found["float32 / float32"].double().mean() < 1


@pytest.mark.slow  # a run of its own
def test_without_half_precision_nothing_differs(run, script, monkeypatch):
    effect = script("effect")
    model, batches, pgd = problem(run)
    monkeypatch.setattr(effect, "computed_in", lambda *_: nullcontext())
    found = effect.measure(model, batches, pgd, seed=0)
    gradients = effect.compare_gradients(model, batches, pgd, seed=0)
    assert gradients["sign"].min() == 1
    torch.testing.assert_close(gradients["cosine"], torch.ones(60, dtype=torch.float64), **EXACT64)
    assert torch.equal(found["loss bfloat16"], found["loss float32"])
    for name, (first, second) in effect.VARIANTS.items():
        if name != "another start, all float32":
            assert torch.equal(found[first], found[second]), name


@pytest.mark.slow  # a run of its own
def test_command_writes_all_stages(run, script, tmp_path, monkeypatch, capsys):
    effect = script("effect")
    arguments = ["effect.py", str(run), "--early", str(run), "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    effect.main()
    written = json.loads((tmp_path / "effect.json").read_text())
    early, best, last = written["checkpoints"]
    assert [part["stage"] for part in (early, best, last)] == ["early", "best", "last"]
    assert (last["data"], last["trained"], last["seed"], last["epoch"]) == ("digits", "default", 0, 11)
    assert early["pairs"] == last["pairs"]  # the same file
    assert last["pairs"]["clean, bf16 evaluation"]["examples"] == 60

    model, batches, pgd = problem(run)
    found = effect.measure(model, batches, pgd, seed=0)
    pairs = last["pairs"]["bf16 attack, float32 evaluation"]
    assert pairs["first"] == int(found["float32 / float32"].sum())
    assert pairs["second"] == int(found["bfloat16 / float32"].sum())
    loss = found["loss bfloat16"] - found["loss float32"]
    mean = last["means"]["loss bfloat16 - float32"]
    assert mean["mean"] == pytest.approx(loss.mean().item(), rel=1e-6, abs=1e-9)
    assert mean["se"] == pytest.approx(stats.sem(loss.numpy()), rel=1e-6)
    shown = capsys.readouterr().out
    assert "| digits, default, last | 60 |" in shown
    share = 100 * pairs["first"] / 60
    assert f" {share:.2f} ± {math.sqrt(share * (100 - share) / 60):.2f} |" in shown


def test_a_run_without_checkpoints_is_named(script, tmp_path):
    effect = script("effect")
    write_hydra(tmp_path / "run", config())
    with pytest.raises(UserError, match=r"best_on_test.ckpt: no such file; give a run"):
        list(effect.checkpoints(find_runs(tmp_path), []))


# ---------------------------------------------------------------------- the runs' definitions


def test_real_images_compose():
    cfg = compose("experiment=precision_cifar10", f"hydra.searchpath=[file://{EXPERIMENT}]", "execution=fast")
    check(cfg)
    assert cfg.trainer.precision == "bf16-mixed"
    assert cfg.model.strides == [2, 2, 2, 2]
    assert cfg.data.partial
    assert cfg.trainer.max_epochs % cfg.trainer.check_val_every_n_epoch == 0  # the last epoch is evaluated
