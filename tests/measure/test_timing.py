"""Tests the table ``timing``, which has one row per epoch with shares of the epoch's wall time."""

import csv
import json
from types import SimpleNamespace

import lightning
import pytest

from robustdyn.data.tensors import ShuffledBatches
from robustdyn.measure import Measure, RecordTiming, timing
from robustdyn.methods import AdversarialTraining, stopwatch
from robustdyn.records import RunRecords
from robustdyn.records.schema import TIMED, TIMING
from robustdyn.run.config import build
from robustdyn.run.parts import build_module
from tests.methods.fits import SaveWithin
from tests.runs import TINY, command, compose

MEASURED = [0, 2]
SMALLER = (*TINY, "model.blocks=[1]", "model.strides=[2]")
UNMEASURED = tuple(o for o in SMALLER if not o.startswith("measure."))


def table(run_dir):
    return [json.loads(line) for line in (run_dir / "records" / "timing.jsonl").read_text().splitlines()]


def run(run_dir, monkeypatch, *overrides):
    assert command(monkeypatch, *SMALLER, f"hydra.run.dir={run_dir}", "report=false", *overrides) == 0
    return table(run_dir)


# ---------------------------------------------------------------------- with the real clock


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Three epochs, measured after the first and the last."""
    run_dir = tmp_path_factory.mktemp("runs") / "undisturbed"
    with pytest.MonkeyPatch.context() as monkeypatch:
        run(run_dir, monkeypatch, "logger=csv")
    return run_dir


def test_one_row_per_epoch_that_adds_up(finished):
    found = table(finished)
    assert [(row["epoch"], row["step"]) for row in found] == [(0, 3), (1, 6), (2, 9)]
    for row in found:
        assert set(row) == set(TIMING.names)
        shares = [row[f"{name}_share"] for name in TIMED]
        assert all(0 <= share <= 1 for share in shares)
        # what is left is callbacks at the epoch's end
        assert 0.5 < sum(shares) <= 1 + 1e-6
        training = row["seconds"] * sum(row[f"{name}_share"] for name in ("attack", "step", "data"))
        assert row["images_per_second"] * training == pytest.approx(80, rel=1e-9)
        assert row["evaluation_share"] > 0
    assert [row["epoch"] for row in found if row["measurement_share"] > 0] == MEASURED


def test_the_measurements_own_account_is_within_its_share(finished):
    found = {row["epoch"]: row for row in table(finished)}
    costs = [json.loads(line) for line in (finished / "records" / "costs.jsonl").read_text().splitlines()]
    whole = [row for row in costs if row["part"] == "all"]
    assert [row["epoch"] for row in whole] == MEASURED
    for row in whole:
        assert row["seconds"] < found[row["epoch"]]["measurement_share"] * found[row["epoch"]]["seconds"]


def test_handed_to_the_loggers(finished):
    with (finished / "csv" / "metrics.csv").open() as file:
        logged = list(csv.DictReader(file))
    columns = ["images_per_second", *(f"{name}_share" for name in TIMED)]
    found = [
        {c: float(row[f"timing/{c}"]) for c in columns} for row in logged if row["timing/images_per_second"]
    ]
    # a logger may keep float32
    assert found == [pytest.approx({c: row[c] for c in columns}, rel=1e-6) for row in table(finished)]


# ---------------------------------------------------------------------- with a clock that we move

TAKES = {"data": 0.5, "attack": 1.0, "step": 2.0, "evaluation": 8.0, "measurement": 16.0}  # seconds
DONE_IN = {
    "data": (ShuffledBatches, "_training_batch"),  # of each batch
    "attack": (AdversarialTraining, "_attacked"),
    "step": (AdversarialTraining, "_outcome"),
    "evaluation": (AdversarialTraining, "validation_step"),  # all 60 test images are one batch
    "measurement": (Measure, "_snapshot"),
}


@pytest.fixture
def clock(monkeypatch):
    """Let time pass only in the functions above."""
    now = [100.0]
    still = SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr(stopwatch, "time", still)
    monkeypatch.setattr(timing, "time", still)

    def slowed(original, seconds):
        def slow(*args, **kwargs):
            now[0] += seconds
            return original(*args, **kwargs)

        return slow

    for name, (owner, function) in DONE_IN.items():
        monkeypatch.setattr(owner, function, slowed(getattr(owner, function), TAKES[name]))


def seconds_of(row):
    """The seconds of each part that took any time."""
    found = {name: row[f"{name}_share"] * row["seconds"] for name in TIMED}
    assert sum(found.values()) == pytest.approx(row["seconds"])
    return {name: seconds for name, seconds in found.items() if seconds}


def taken(batches=3, evaluations=1, measured=False):
    counts = {"data": batches, "attack": batches, "step": batches}
    counts |= {"evaluation": evaluations, "measurement": int(measured)}
    return pytest.approx({name: TAKES[name] * count for name, count in counts.items() if count})


def test_each_part_is_booked_where_it_belongs(clock, tmp_path, monkeypatch):
    for row in run(tmp_path, monkeypatch):
        assert seconds_of(row) == taken(measured=row["epoch"] in MEASURED)
        assert row["images_per_second"] == pytest.approx(80 / (3 * 3.5))


def test_epochs_without_evaluation(clock, tmp_path, monkeypatch):
    found = run(tmp_path, monkeypatch, "trainer.check_val_every_n_epoch=2", "measure.epochs=[]")
    assert [seconds_of(row) for row in found] == [taken(evaluations=n) for n in (0, 1, 0)]
    assert found[0]["evaluation_share"] == found[0]["measurement_share"] == 0


@pytest.mark.slow
def test_evaluation_within_the_epoch(clock, tmp_path, monkeypatch):
    arguments = ("+trainer.val_check_interval=1", "trainer.max_epochs=2", "measure.epochs=[]")
    found = run(tmp_path, monkeypatch, *arguments)
    assert [seconds_of(row) for row in found] == [taken(evaluations=3)] * 2


@pytest.mark.slow
def test_epochs_that_are_cut_short_count_the_images_seen(clock, tmp_path, monkeypatch):
    arguments = ("+trainer.limit_train_batches=2", "trainer.max_epochs=2", "measure.epochs=[]")
    for row in run(tmp_path, monkeypatch, *arguments):
        assert seconds_of(row) == taken(batches=2)
        assert row["images_per_second"] == pytest.approx(64 / (2 * 3.5))


@pytest.mark.slow
def test_resumed_runs_have_one_row_per_epoch(clock, tmp_path, monkeypatch):
    first = run(tmp_path, monkeypatch, "trainer.max_epochs=1", "measure.epochs=[]", "resume=changed")
    found = run(tmp_path, monkeypatch, "measure.epochs=[]", "resume=changed")
    assert found[:1] == first
    assert [row["epoch"] for row in found] == [0, 1, 2]
    assert [seconds_of(row) for row in found] == [taken()] * 3


def test_a_run_that_resumes_within_an_epoch_times_what_is_left_of_it(clock, tmp_path):
    path = tmp_path / "within.ckpt"
    for folder, resume in (("whole", None), ("rest", path)):
        cfg = compose(*UNMEASURED)
        lightning.seed_everything(cfg.seed, verbose=False)
        data = build(cfg, "data")
        data.prepare_data()
        data.setup("fit")
        callbacks = [RecordTiming(RunRecords(tmp_path / folder)), *([] if resume else [SaveWithin(path)])]
        settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = build(cfg, "trainer", callbacks=callbacks, **settings)
        trainer.fit(build_module(cfg, data), datamodule=data, ckpt_path=resume, weights_only=True)
    assert [seconds_of(row) for row in table(tmp_path / "whole")] == [taken()] * 3
    rest, *others = table(tmp_path / "rest")
    # also the evaluation, which came after the checkpoint
    assert seconds_of(rest) == taken(batches=1)
    assert rest["images_per_second"] == pytest.approx(16 / 3.5)
    assert [seconds_of(row) for row in others] == [taken()] * 2
