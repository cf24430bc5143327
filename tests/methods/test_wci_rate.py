"""Tests the learning rate that follows a measurement: the rule by itself, and in whole runs."""

import json

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from robustdyn.measure import Measure
from robustdyn.methods import AdversarialTraining, WCIRate
from robustdyn.records import RunRecords
from robustdyn.run.config import build
from robustdyn.run.parts import build_module, measurement_plan
from tests.runs import command, compose, rows, tiny_but


def rule(**changes):
    settings = {"start_epoch": 5, "factor": 0.1, "interval": 1, "quantity": "wci", "threshold": 20.0}
    return WCIRate(**(settings | {"monotone": False} | changes))


def row(epoch, wci, hessian_trace=1.0):
    return {"epoch": epoch, "wci": wci, "hessian_trace": hessian_trace}


def test_is_flat_up_to_the_decay_and_then_follows():
    follow = rule()
    assert [follow.factor(t) for t in (0, 4.99, 5, 9)] == [1.0, 1.0, 0.1, 0.1]
    follow.observe(row(4, 80.0))  # the last epoch at the full rate
    assert follow.factor(4.99) == 1.0
    assert follow.factor(5) == pytest.approx(0.1 * 20 / 80, rel=1e-15)
    follow.observe(row(5, 25.0))
    assert follow.factor(6) == pytest.approx(0.1 * 20 / 25, rel=1e-15)
    follow.observe(row(6, 20.0))
    assert follow.factor(7) == 0.1
    follow.observe(row(7, 3.0))  # below the threshold the rate is the paper's, not above it
    assert follow.factor(8) == 0.1
    follow.observe(row(8, 0.0))
    assert follow.factor(9) == 0.1


def test_monotone_never_rises_again():
    follow, found = rule(monotone=True), []
    for epoch, wci in enumerate((40.0, 10.0, 80.0, 50.0), start=4):
        follow.observe(row(epoch, wci))
        found.append(follow.factor(epoch + 1))
    assert found == pytest.approx([0.05, 0.05, 0.025, 0.025], rel=1e-15)


def test_can_follow_the_trace():
    follow = rule(quantity="hessian_trace", threshold=100.0)
    follow.observe(row(4, 1e9, hessian_trace=400.0))
    assert follow.factor(5) == pytest.approx(0.1 / 4, rel=1e-15)
    follow.observe(row(5, 1e9, hessian_trace=-400.0))  # a saddle damps nothing
    assert follow.factor(6) == 0.1


def test_reads_every_interval_and_nothing_else():
    assert rule().reading_epochs(9) == (4, 5, 6, 7)  # no rate follows the last epoch
    assert rule(interval=3).reading_epochs(12) == (4, 7, 10)
    assert rule(interval=3).reading_epochs(11) == (4, 7)
    assert rule(start_epoch=1).reading_epochs(3) == (0, 1)
    assert rule().reading_epochs(5) == ()  # a start beyond the run
    assert rule().reading_epochs(4) == ()
    follow = rule(interval=3)
    for epoch in (0, 3, 5, 6, 8):  # measured for the record only
        follow.observe(row(epoch, 1e6))
    assert follow.factor(9) == 0.1
    follow.observe(row(7, 40.0))
    assert follow.factor(9) == pytest.approx(0.05)


def test_names_its_table_and_its_decay():
    assert WCIRate.reads == "wci"
    assert rule().decay_epochs(6) == (5,)
    assert rule().decay_epochs(5) == ()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_refuses_to_follow_what_is_not_finite(value):
    with pytest.raises(ValueError, match=r"cannot follow wci=-?(nan|inf) of epoch 4"):
        rule().observe(row(4, value))


def test_goes_on_from_its_state():
    follow, other = rule(monotone=True), rule(monotone=True)
    follow.observe(row(4, 40.0))
    other.load_state_dict(json.loads(json.dumps(follow.state_dict())))
    assert other.factor(5) == follow.factor(5) == pytest.approx(0.05)
    other.observe(row(5, 10.0))
    assert other.factor(6) == pytest.approx(0.05)
    other.load_state_dict({})  # a run that began under another rule
    assert other.factor(6) == 0.1


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"start_epoch": 0}, "start_epoch must be at least 1, got 0"),
        ({"interval": 0}, "interval must be at least 1, got 0"),
        ({"factor": 0.0}, "factor must be positive, got 0.0"),
        ({"threshold": float("nan")}, "threshold must be positive, got nan"),
        ({"quantity": "trace"}, "quantity must be wci or hessian_trace, got trace"),
    ],
)
def test_refuses_settings_outside_their_range(setting, message):
    with pytest.raises(ValueError, match=message):
        rule(**setting)


EPOCHS, START, THRESHOLD = 6, 2, 3.0
WCI = (
    *tiny_but("schedule.", "measure.epochs", "trainer.max_epochs"),
    "method=wci_lr",
    f"trainer.max_epochs={EPOCHS}",
    f"schedule.start_epoch={START}",
    f"schedule.threshold={THRESHOLD}",
    "attack.steps=1",
    "data.test_size=20",
    "report=false",
)


def run(monkeypatch, run_dir, *overrides):
    return command(monkeypatch, *WCI, f"hydra.run.dir={run_dir}", *overrides)


def state(run_dir):
    return torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run that measures only what its rule reads, every second epoch."""
    run_dir = tmp_path_factory.mktemp("wci") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert run(monkeypatch, run_dir, "measure=none", "schedule.interval=2") == 0
    return run_dir


def expected_rates(run_dir, base, column="wci", reading=lambda epoch: True):
    """η of every epoch from the recorded measurements, according to the paper's text."""
    read = {r["epoch"]: r[column] for r in rows(run_dir, "wci") if reading(r["epoch"])}
    rates = []
    for epoch in range(EPOCHS):
        last = [read[e] for e in sorted(read) if START - 1 <= e < epoch]
        rates.append(base if epoch < START else base * (0.1 * min(1.0, THRESHOLD / last[-1])))
    return rates


def test_the_rate_of_every_epoch_follows_the_record(alone):
    found = [r["lr"] for r in rows(alone, "epochs")]
    assert found == expected_rates(alone, 0.1)  # exactly
    assert len(set(found[START:])) == 2  # the readings after epochs 1 and 3 were above the threshold
    assert all(r["wci"] > THRESHOLD for r in rows(alone, "wci"))
    # and no step within an epoch has another rate
    changes = [(r["epoch"], r["step"], r["lr"]) for r in rows(alone, "rates")]
    assert changes == [(e, 3 * e, found[e]) for e in (0, 2, 4)]


def test_only_what_the_rule_reads_is_measured(alone):
    assert [r["epoch"] for r in rows(alone, "wci")] == [1, 3]  # not 5: no rate follows
    assert {r["epoch"] for r in rows(alone, "layers")} == {1, 3}
    assert {path.stem for path in (alone / "records").iterdir()} == {
        "epochs",
        "rates",
        "wci",
        "layers",
        "costs",
        "timing",
    }
    assert rows(alone, "costs") == [
        {"epoch": e, "step": 3 * (e + 1), "part": "all", "products": None, "converged": None, "warm": None}
        for e in (1, 3)
    ]


@pytest.mark.slow  # two more runs; tests/methods/test_averaging.py kills one that follows the index too
@pytest.mark.parametrize("killed_in", [4, 3, 2])
def test_goes_on_where_it_was_killed(killed_in, alone, tmp_path, monkeypatch):
    # 4: between two readings; 3: the next epoch ends with one; 2: right after the first
    step = AdversarialTraining.training_step

    def killed(self, batch, batch_idx):
        if self.global_step == 3 * killed_in + 1:
            raise KeyError("killed")
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(AdversarialTraining, "training_step", killed)
        with pytest.raises(KeyError, match="killed"):
            run(patch, tmp_path, "measure=none", "schedule.interval=2")
    assert len(rows(tmp_path, "epochs")) == killed_in
    assert run(monkeypatch, tmp_path, "measure=none", "schedule.interval=2") == 0
    for table in ("epochs", "rates", "wci", "layers", "costs"):
        assert rows(tmp_path, table) == rows(alone, table), table
    ours, theirs = state(tmp_path), state(alone)
    assert ours["schedule"] == theirs["schedule"]
    assert all(torch.equal(v, theirs["state_dict"][k]) for k, v in ours["state_dict"].items())


@pytest.mark.slow  # a second whole run
def test_the_trace_can_be_what_is_followed(tmp_path, monkeypatch):
    overrides = ("measure=none", "schedule.quantity=hessian_trace", "schedule.monotone=true")
    assert run(monkeypatch, tmp_path, *overrides) == 0
    read = {r["epoch"]: r["hessian_trace"] for r in rows(tmp_path, "wci")}
    assert sorted(read) == [1, 2, 3, 4]
    damping, found = 1.0, [r["lr"] for r in rows(tmp_path, "epochs")]
    for epoch in range(START, EPOCHS):
        damping = min(damping, THRESHOLD / read[epoch - 1])
        assert found[epoch] == 0.1 * (0.1 * damping)


class Witness(Callback):
    """Writes each rank's rates to a file of its own."""

    def __init__(self, folder):
        self._folder = folder
        self._rates = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._rates.append(pl_module.last_step.learning_rate)

    def on_train_end(self, trainer, pl_module):
        (self._folder / f"{trainer.global_rank}.json").write_text(json.dumps(self._rates))


def two_ranks(folder, *overrides):
    """The rate of every step on each of two ranks, which measure what the rule reads."""
    # PyTorch's own synchronised BatchNorm is for GPUs
    cfg = compose(*overrides, "measure.examples=23", "trainer.sync_batchnorm=false")
    data = build(cfg, "data")
    data.prepare_data()
    data.setup("fit")
    measure = Measure(
        epochs=[],
        examples=cfg.measure.examples,
        inputs=cfg.measure.inputs,
        weights="trained",
        plan=measurement_plan(cfg),
        records=RunRecords(folder),
    )
    trainer = build(
        cfg,
        "trainer",
        devices=2,
        strategy="ddp_spawn",
        callbacks=[measure, Witness(folder)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(build_module(cfg, data), datamodule=data)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow  # starts two processes
def test_two_ranks_step_at_the_same_rate(tmp_path):
    first, second = two_ranks(tmp_path, *WCI, "measure=none")
    assert first == second  # to the bit: the weights would drift apart
    assert first[::3] == expected_rates(tmp_path, 0.1)
    assert len(set(first)) == EPOCHS - START + 1
