"""Tests weight averages against averages kept by hand, and the results of early stopping."""

import json
import shutil

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from robustdyn.commands import train as train_module
from robustdyn.commands.measure import main as measure
from robustdyn.methods import AdversarialTraining, EpochAveraging
from robustdyn.methods.averaging import ExponentialAveraging
from robustdyn.run.config import build
from tests.runs import command, compose, invoke, rows, tiny_but
from tests.tolerances import EXACT32

EPOCHS, STEPS, DECAY = 4, 3, 0.3  # which is below (1 + t) / (10 + t) from the third average on
SHORT = (
    *tiny_but("schedule.", "measure.epochs", "trainer.max_epochs"),
    "schedule=wci",
    "schedule.start_epoch=2",
    "schedule.threshold=3",
    "measure=none",
    "attack.steps=1",
    "data.test_size=20",
    f"trainer.max_epochs={EPOCHS}",
    "report=false",
)
EMA = ("averaging=ema", f"averaging.decay={DECAY}")
SWA = ("averaging=swa", "averaging.start_epoch=1")


class Ledger(Callback):
    """The trained weights after every step, and the weights that every evaluation saw."""

    def __init__(self):
        self.trained, self.evaluated = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.trained.append(_copy(pl_module.model))

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.evaluated.append(_copy(pl_module.model))


def _copy(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def run(monkeypatch, run_dir, *overrides):
    """Train a run; return it with its ledger."""
    ledger = Ledger()
    with monkeypatch.context() as patch:
        callbacks = train_module.build_callbacks
        patch.setattr(train_module, "build_callbacks", lambda *a: [ledger, *callbacks(*a)])
        assert command(patch, *SHORT, f"hydra.run.dir={run_dir}", *overrides) == 0
    return ledger


def saved(run_dir, name="last"):
    return torch.load(run_dir / "checkpoints" / f"{name}.ckpt", weights_only=True)


def model_of(state):
    return {name[6:]: value for name, value in state.items() if name.startswith("model.")}


def assert_close(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if not found[
            name
        ].is_floating_point():  # how many batches BatchNorm saw: an average would be no count
            continue
        torch.testing.assert_close(found[name], value, **(tolerance or EXACT32), msg=name)


def ema_by_hand(trained):
    """w̄ after every step."""
    averages = [trained[0]]
    for t, weights in enumerate(trained[1:], start=1):
        last, decay = averages[-1], min(DECAY, (1 + t) / (10 + t))
        averages.append({k: decay * last[k] + (1 - decay) * weights[k] for k in weights})
    return averages


def swa_by_hand(trained, start):
    """What is evaluated after every epoch."""
    ends = trained[STEPS - 1 :: STEPS]
    found = []
    for epoch in range(EPOCHS):
        used = ends[start : epoch + 1] or [ends[epoch]]
        found.append({k: torch.stack([w[k].double() for w in used]).mean(0).float() for k in used[0]})
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same run without an average, with an exponential one and with an equal one."""
    folder = tmp_path_factory.mktemp("averaging")
    with pytest.MonkeyPatch.context() as monkeypatch:
        return {
            name: (folder / name, run(monkeypatch, folder / name, *overrides))
            for name, overrides in (("none", ()), ("ema", EMA), ("swa", SWA))
        }


@pytest.mark.parametrize("name", ["ema", "swa"])
def test_the_average_is_evaluated_and_saved_and_the_weights_are_trained(name, runs):
    plain, (run_dir, ledger) = runs["none"][1], runs[name]
    for ours, theirs in zip(ledger.trained, plain.trained, strict=True):
        assert all(torch.equal(ours[k], theirs[k]) for k in theirs)  # averaging does not affect training
    if name == "ema":
        expected = ema_by_hand(plain.trained)[STEPS - 1 :: STEPS]
    else:
        expected = swa_by_hand(plain.trained, start=1)
    for found, average in zip(ledger.evaluated, expected, strict=True):
        assert_close(found, average)
    last = saved(run_dir)
    assert_close(model_of(last["state_dict"]), expected[-1])
    assert_close(model_of(last["current_model_state"]), plain.trained[-1], rtol=0, atol=0)
    # BatchNorm's statistics are averages too, not those of the trained weights
    statistics = [k for k in expected[-1] if k.endswith("running_mean")]
    assert statistics
    for key in statistics:
        assert not torch.allclose(expected[-1][key], plain.trained[-1][key], rtol=1e-3)


def test_before_its_first_epoch_the_equal_average_is_the_weights(runs):
    ledger = runs["swa"][1]
    first, trained = ledger.evaluated[0], ledger.trained[STEPS - 1]
    assert all(torch.equal(first[k], trained[k]) for k in trained)


@pytest.mark.parametrize("name", ["ema", "swa"])
def test_measured_are_the_weights(name, runs):
    plain, averaged = runs["none"][0], runs[name][0]
    for table in ("wci", "layers", "rates"):
        assert rows(averaged, table) == rows(plain, table)
    ours, theirs = rows(averaged, "epochs"), rows(plain, "epochs")
    for mine, other in zip(ours, theirs, strict=True):
        assert {k: v for k, v in mine.items() if k.startswith("train_")} == {
            k: v for k, v in other.items() if k.startswith("train_")
        }
    assert ours[-1]["test_robust_loss"] != theirs[-1]["test_robust_loss"]


@pytest.mark.parametrize("name", ["ema", pytest.param("swa", marks=pytest.mark.slow)])
def test_the_average_can_be_measured_and_the_rule_then_follows_it(name, tmp_path, monkeypatch):
    overrides = {"ema": EMA, "swa": SWA}[name]
    ledger = run(monkeypatch, tmp_path, *overrides, "measure.weights=averaged")
    averages = (
        ema_by_hand(ledger.trained)[STEPS - 1 :: STEPS]
        if name == "ema"
        else swa_by_hand(ledger.trained, start=1)
    )
    measured = rows(tmp_path, "layers")
    assert {row["epoch"] for row in measured} == {1, 2}  # those after which the rule sets a rate
    for row in measured:
        weights = averages[row["epoch"]][row["layer"]]
        assert row["weight_norm_sq"] == pytest.approx(float(weights.double().square().sum()), rel=1e-5)
    index = {row["epoch"]: row["wci"] for row in rows(tmp_path, "wci")}
    rates = {row["epoch"]: row["lr"] for row in rows(tmp_path, "epochs")}
    for epoch in (2, 3):
        assert rates[epoch] == pytest.approx(0.01 * min(1, 3 / index[epoch - 1]))
    # both are in the checkpoint
    for choice, weights in (("averaged", averages[-1]), ("trained", ledger.trained[-1])):
        settings = (
            f"measure.weights={choice}",
            f"output={tmp_path / choice}",
            "measure=index",
            "report=false",
        )
        last = tmp_path / "checkpoints" / "last.ckpt"
        small = ("measure.examples=24", "device=cpu")
        assert invoke(measure, monkeypatch, f"checkpoint={last}", *settings, *small) == 0
        for row in rows(tmp_path / choice, "layers"):
            squared = float(weights[row["layer"]].double().square().sum())
            assert row["weight_norm_sq"] == pytest.approx(squared, rel=1e-5)
    # afterwards the weights that are trained are in place again
    assert_close(model_of(saved(tmp_path)["current_model_state"]), ledger.trained[-1], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["none", "ema", "swa"])
def test_the_best_checkpoint_holds_what_the_summary_says_was_best(name, runs):
    run_dir, ledger = runs[name]
    best = json.loads((run_dir / "summary.json").read_text())["best_on_test"]
    checkpoint = saved(run_dir, "best_on_test")
    assert checkpoint["epoch"] == best["epoch"]
    weights = model_of(checkpoint["state_dict"])
    seen = ledger.evaluated[best["epoch"]]
    assert all(torch.equal(weights[k], seen[k]) for k in seen)
    # these weights have that error
    cfg = compose(*SHORT)
    data, model = build(cfg, "data"), build(cfg, "model")
    data.prepare_data()
    data.setup("fit")
    model.load_state_dict(weights)
    model.eval()
    batch = next(iter(data.val_dataloader()[0]))  # all 20 test images
    with torch.no_grad():
        wrong = (model(batch.images).argmax(dim=1) != batch.targets).float().mean()
    assert float(wrong) == pytest.approx(best["test_clean_error"], abs=1e-6)


@pytest.mark.parametrize("name", ["ema", pytest.param("swa", marks=pytest.mark.slow)])
def test_goes_on_bit_for_bit(name, runs, tmp_path, monkeypatch):
    step = AdversarialTraining.training_step
    overrides = {"ema": EMA, "swa": SWA}[name]

    def killed(self, batch, batch_idx):
        if self.global_step == 2 * STEPS + 1:
            raise KeyError("killed")
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(AdversarialTraining, "training_step", killed)
        with pytest.raises(KeyError, match="killed"):
            run(patch, tmp_path, *overrides)
    run(monkeypatch, tmp_path, *overrides)
    undisturbed = runs[name][0]
    for table in ("epochs", "rates", "wci", "layers"):
        assert rows(tmp_path, table) == rows(undisturbed, table), table
    ours, theirs = saved(tmp_path), saved(undisturbed)
    for key in ("state_dict", "current_model_state", "averaging_state"):
        assert all(torch.equal(ours[key][k], v) for k, v in theirs[key].items()), key


@pytest.mark.slow  # a whole run
def test_an_average_that_begins_late_is_resumed_before_it_begins(tmp_path, monkeypatch):
    late = ("averaging=swa", "averaging.start_epoch=3")
    step = AdversarialTraining.training_step

    def killed(self, batch, batch_idx):
        if self.global_step == STEPS + 1:
            raise KeyError("killed")
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(AdversarialTraining, "training_step", killed)
        with pytest.raises(KeyError, match="killed"):
            run(patch, tmp_path, *late)
    ledger = run(monkeypatch, tmp_path, *late)
    # one epoch is averaged: its end
    for found, trained in zip(ledger.evaluated, ledger.trained[STEPS - 1 :: STEPS], strict=True):
        assert all(torch.equal(found[k], trained[k]) for k in trained)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_refuses_a_decay_outside_its_range(decay):
    with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\)"):
        ExponentialAveraging(decay=decay)


def test_refuses_a_negative_start():
    with pytest.raises(ValueError, match="start_epoch must be at least 0, got -1"):
        EpochAveraging(start_epoch=-1)


PATIENCE = 2
STOPPING = (
    *tiny_but("schedule.", "measure.epochs", "trainer.max_epochs"),
    "schedule=constant",
    "optimizer.lr=1e-12",  # nothing is learned: only BatchNorm's statistics settle
    "measure.epochs=[0]",
    "~measure.measurements.alignment",
    "~measure.measurements.weight_curvature",
    "attack.steps=1",
    "trainer.max_epochs=40",
    "data.test_size=20",
    "data.validation_size=40",
    "stopping=early",
    f"stopping.patience={PATIENCE}",
)


def stops_after(errors, patience):
    """The epoch after which no improvement was seen for ``patience`` epochs."""
    best, waited = float("inf"), 0
    for epoch, error in enumerate(errors):
        best, waited = (error, 0) if error < best else (best, waited + 1)
        if waited == patience:
            return epoch
    return None


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("stopping") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert command(monkeypatch, *STOPPING, f"hydra.run.dir={run_dir}", "report=false") == 0
    return run_dir


def validation_errors(run_dir):
    return [row["validation_robust_error"] for row in rows(run_dir, "epochs")]


def test_stops_when_the_validation_error_has_not_improved(stopped):
    errors = validation_errors(stopped)
    assert len(errors) < 40
    assert stops_after(errors, PATIENCE) == len(errors) - 1


def test_a_stopped_run_is_a_whole_run(stopped):
    posterior = rows(stopped, "posterior")
    assert [row["epoch"] for row in posterior if row["index"] == 0] == list(
        range(len(validation_errors(stopped)))
    )
    summary = json.loads((stopped / "summary.json").read_text())
    epochs = rows(stopped, "epochs")
    assert summary["final"]["epoch"] == len(epochs) - 1
    for split in ("test", "validation"):
        best = min(epochs, key=lambda row: row[f"{split}_robust_error"])  # the first of equals
        assert summary[f"best_on_{split}"]["epoch"] == best["epoch"]
        assert saved(stopped, f"best_on_{split}")["epoch"] == best["epoch"]
    assert saved(stopped)["epoch"] == len(epochs) - 1


@pytest.mark.slow  # two runs
def test_started_again_it_stays_stopped_unless_it_is_given_more_patience(stopped, tmp_path, monkeypatch):
    before, last = rows(stopped, "epochs"), (stopped / "checkpoints" / "last.ckpt").read_bytes()
    assert command(monkeypatch, *STOPPING, f"hydra.run.dir={stopped}", "report=false") == 0
    assert rows(stopped, "epochs") == before
    assert (stopped / "checkpoints" / "last.ckpt").read_bytes() == last
    shutil.copytree(stopped, tmp_path / "more")
    more = (
        f"hydra.run.dir={tmp_path / 'more'}",
        f"stopping.patience={PATIENCE + 1}",
        "report=false",
        "resume=changed",
    )
    assert command(monkeypatch, *STOPPING, *more) == 0
    errors = validation_errors(tmp_path / "more")
    assert len(errors) > len(before)
    assert stops_after(errors, PATIENCE + 1) == len(errors) - 1


@pytest.mark.slow  # draws figures
def test_the_report_of_a_stopped_run_is_written(stopped, tmp_path, monkeypatch):
    shutil.copytree(stopped, tmp_path / "run")
    assert command(monkeypatch, *STOPPING, f"hydra.run.dir={tmp_path / 'run'}") == 0
    assert (tmp_path / "run" / "report" / "index.html").exists()


@pytest.mark.slow  # a whole run
def test_best_checkpoints_are_those_of_evaluated_epochs(tmp_path, monkeypatch):
    every_second = ("trainer.check_val_every_n_epoch=2", "trainer.max_epochs=6")
    ledger = run(monkeypatch, tmp_path, *every_second)
    epochs = rows(tmp_path, "epochs")
    assert [row["test_robust_error"] is None for row in epochs] == [True, False] * 3
    best = json.loads((tmp_path / "summary.json").read_text())["best_on_test"]
    checkpoint = saved(tmp_path, "best_on_test")
    assert checkpoint["epoch"] == best["epoch"]
    seen = ledger.evaluated[best["epoch"] // 2]
    assert all(torch.equal(value, seen[k]) for k, value in model_of(checkpoint["state_dict"]).items())
