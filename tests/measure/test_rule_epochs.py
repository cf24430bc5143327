"""Tests that epochs only requested by the learning-rate rule are measured once, and only what it reads."""

from types import SimpleNamespace

import pytest

from robustdyn.errors import ConfigError
from robustdyn.measure import Measure, WeightCurvature
from robustdyn.records import RunRecords, schema
from robustdyn.run.config import build
from robustdyn.run.parts import build_module, measurement_plan
from tests.runs import command, compose, rows, tiny_but

EPOCHS, START, THRESHOLD = 6, 2, 3.0
WCI = (
    *tiny_but("schedule.", "measure.epochs", "trainer.max_epochs"),
    "method=wci_lr",
    f"trainer.max_epochs={EPOCHS}",
    f"schedule.start_epoch={START}",
    f"schedule.threshold={THRESHOLD}",
    "attack.steps=1",
    "data.test_size=20",
)


def run(monkeypatch, run_dir, *overrides):
    return command(monkeypatch, *WCI, f"hydra.run.dir={run_dir}", "report=false", *overrides)


def following(run_dir):
    """The rate of every epoch since the rule's start, from the index measured after the previous epoch."""
    read = {row["epoch"]: row["wci"] for row in rows(run_dir, "wci")}
    return [0.01 * (0.1 * min(1.0, THRESHOLD / read[epoch - 1])) for epoch in range(START, EPOCHS)]


def due(*overrides):
    """Names of the classes that measure after each epoch."""
    cfg = compose(*WCI, *overrides)
    data = build(cfg, "data")
    data.prepare_data()
    data.setup("fit")
    module = build_module(cfg, data)
    measure = Measure(
        epochs=list(cfg.measure.epochs),
        examples=cfg.measure.examples,
        inputs="adversarial",
        weights="trained",
        plan=measurement_plan(cfg),
        records=RunRecords("nowhere"),
    )
    optimizer = build(cfg, "optimizer")(module.parameters())
    trainer = module.trainer = SimpleNamespace(
        gradient_clip_val=None,
        max_epochs=EPOCHS,
        datamodule=data,
        world_size=1,
        is_global_zero=True,
        optimizers=[optimizer],
    )
    measure.on_train_start(trainer, module)
    return [[type(m).__name__ for m in measure._due(epoch, module.schedule.reads)] for epoch in range(EPOCHS)]


ALL, RULE = ["Spectrum", "Alignment", "WeightCurvature"], ["WeightCurvature"]


def test_what_is_due_after_every_epoch():
    assert due("measure.epochs=[0,2]") == [ALL, RULE, ALL, RULE, RULE, ALL]
    assert due("measure.epochs=[]") == [[], RULE, RULE, RULE, RULE, []]
    assert due("measure.epochs=[]", "schedule.interval=3") == [[], RULE, [], [], RULE, []]


def test_a_set_that_is_too_large_is_refused_where_only_the_rule_measures():
    with pytest.raises(ConfigError, match=r"measure\.examples=81 must be between 1 and the 80 training"):
        due("measure.epochs=[]", "measure.examples=81")


def test_nothing_is_measured_twice(tmp_path, monkeypatch):
    calls = []
    measure = WeightCurvature.measure

    def counted(self, snapshot):
        calls.append(snapshot.epoch)
        return measure(self, snapshot)

    monkeypatch.setattr(WeightCurvature, "measure", counted)
    overrides = ("measure.epochs=[0,2]", "optimizer=adam", "optimizer.lr=0.01")
    assert run(monkeypatch, tmp_path, *overrides) == 0
    # 0 and the last for the record, 1, 3, 4 for the rule, 2 for both
    assert calls == [0, 1, 2, 3, 4, 5]
    assert [r["epoch"] for r in rows(tmp_path, "wci")] == calls
    assert sorted({r["epoch"] for r in rows(tmp_path, "spectrum")}) == [0, 2, 5]
    assert [r["epoch"] for r in rows(tmp_path, "alignment")] == [0, 2, 5]
    assert [r["epoch"] for r in rows(tmp_path, "costs") if r["part"] == "all"] == calls
    solved = [r for r in rows(tmp_path, "costs") if r["part"] != "all"]
    assert [(r["epoch"], r["warm"]) for r in solved] == [(0, False)] * 2 + [(2, True)] * 2 + [(5, True)] * 2
    # also with an optimiser that is not the paper's
    assert [r["lr"] for r in rows(tmp_path, "epochs")] == [0.01, 0.01, *following(tmp_path)]


def test_a_measurement_that_is_not_finite_ends_the_run_in_one_line(tmp_path, monkeypatch, capsys):
    def diverged(self, snapshot):
        yield (
            "wci",
            dict.fromkeys(schema.table("wci").required) | {"epoch": snapshot.epoch, "wci": float("nan")},
        )

    monkeypatch.setattr(WeightCurvature, "measure", diverged)
    assert run(monkeypatch, tmp_path, "measure=none", "schedule.start_epoch=1") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: schedule: the learning rate cannot follow wci=nan of epoch 0; ")
    assert "optimizer.lr" in error
    assert [r["wci"] for r in rows(tmp_path, "wci")] == [None]
