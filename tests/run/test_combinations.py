"""What cannot go together is refused when the run is composed, in one line; what can is not."""

import re

import pytest
from torch import nn

from robustdyn.commands.posterior import main as posterior_command
from robustdyn.errors import ConfigError
from robustdyn.run.combinations import check_combinations
from robustdyn.run.config import check
from tests.runs import command, compose, rows, tiny_but


def without_batchnorm(**settings):
    return nn.Linear(1, 1)


TEN = "trainer.max_epochs=10"
REFUSED = [
    (
        ("metric=final.test_robust_eror",),
        "metric=final.test_robust_eror is not a number in summary.json; choose final.test_robust_error or",
    ),
    (
        ("metric=best_on_validation.validation_robust_error",),
        "metric=best_on_validation.validation_robust_error is not a number in summary.json; choose ",
    ),
    (
        ("trainer.inference_mode=true",),
        "trainer.inference_mode=true leaves the attacks of an evaluation without gradients; choose false",
    ),
    (
        ("trainer.precision=bf16-true",),
        "trainer.precision=bf16-true holds the weights and the metrics in half precision; choose bf16-mixed",
    ),
    (
        ("+trainer.overfit_batches=2",),
        "trainer.overfit_batches=2 would take other images in every epoch, because the order is drawn for "
        "all of them; choose data.train_size",
    ),
    (
        ("+trainer.max_time=00:01:00:00",),
        "trainer.max_time=00:01:00:00 would end the training within an epoch",
    ),
    (("+trainer.max_steps=100",), "trainer.max_steps=100 would end the training within an epoch"),
    (
        ("schedule=wci", "~measure.measurements.weight_curvature"),
        "schedule WCIRate follows the measured table wci, but measure.measurements has nothing that measures "
        "it; choose measure=default, or measure=none for nothing but what the schedule follows, or another",
    ),
    (
        ("schedule=bound", "measure=index"),
        "schedule BoundRate follows the measured table bounds, but measure.measurements has nothing that "
        "measures it; choose measure=default, or measure=none",
    ),
    (
        ("schedule=wci", TEN, "schedule.start_epoch=10"),
        "schedule.start_epoch=10 is not reached by trainer.max_epochs=10, so that no rate follows a "
        "measurement; choose an earlier start_epoch, or schedule=constant",
    ),
    (
        ("objective=mart", "++data.mixup=0.5"),
        "data.mixup=0.5 mixes labels, but objective MART compares the labelled class with the others; choose "
        "data.mixup=0, or objective=at or trades",
    ),
    (
        ("added_noise=gaussian", "++data.mixup=0.5"),
        "data.mixup=0.5 puts every image into two examples of a batch, whose gradients then depend on each "
        "other, and added_noise takes them as independent; choose data.mixup=0, or added_noise=none",
    ),
    (
        ("added_noise=gaussian", "added_noise.factor=-1"),
        "added_noise.factor must be at least 0, got -1",
    ),
    (
        ("measure=full", "measure.measurements.density=null"),
        "measure.measurements.bound needs the tables density, whole_space, which no measurement before it "
        "gives; choose measure=bound or measure=full, or measure.measurements.bound=null",
    ),
    (
        ("stopping=early",),
        "stopping=early watches held-out training images, but data.validation_size=0; choose a size, or "
        "stopping=none",
    ),
    (
        ("stopping=early", "data.validation_size=100", "trainer.check_val_every_n_epoch=2"),
        "stopping=early needs an evaluation after every epoch, but trainer.check_val_every_n_epoch=2; choose "
        "1, or stopping=none",
    ),
    (
        ("stopping=early", "data.validation_size=100", "stopping.monitor=val_loss"),
        "stopping.monitor=val_loss is not a column of the epochs table; choose validation_robust_error or",
    ),
    (
        ("averaging=swa", TEN, "averaging.start_epoch=10"),
        "averaging.start_epoch=10 is not reached by trainer.max_epochs=10, so that nothing is averaged; "
        "choose an earlier start_epoch, or averaging=none",
    ),
    (
        ("measure.weights=averaged",),
        "measure.weights=averaged measures the average of the weights, but this run keeps none; choose "
        "averaging=ema or swa, or measure.weights=trained",
    ),
    (
        ("+attack.evaluation.projection=range",),
        "attack.evaluation.projection=range lets the attack leave the ball in which robustness is evaluated; "
        "choose ball",
    ),
    (
        ("method=nfgsm", "attack.train.projection=ball"),
        "attack.train.relative_start=2 starts outside the ball onto which projection=ball projects; choose",
    ),
    (
        ("batchnorm.frozen_from=10", TEN),
        "batchnorm.frozen_from=10 is not reached by trainer.max_epochs=10, so that no statistics are frozen; "
        "choose an earlier epoch, or null",
    ),
    (
        ("batchnorm.frozen_from=1", "model._target_=tests.run.test_combinations.without_batchnorm"),
        "batchnorm.frozen_from=1 freezes the statistics of BatchNorm, and model without_batchnorm has no "
        "BatchNorm; choose null, or another model",
    ),
    (
        ("schedule=cosine", "schedule.length=5", TEN),
        "schedule: the learning rate is not positive in epoch 5 of trainer.max_epochs=10; choose "
        "schedule.length=10",
    ),
    (
        ("schedule=one_cycle", "schedule.length=5", TEN),
        "schedule: the learning rate is not positive in epoch 5 of trainer.max_epochs=10; choose "
        "schedule.length=10",
    ),
    (
        ("optimizer.nesterov=true", "optimizer.momentum=0"),
        "optimizer: Nesterov momentum requires a momentum and zero dampening",
    ),
    (("optimizer=adam", "optimizer.betas=[0.9,1.5]"), "optimizer: Invalid beta parameter at index 1: 1.5"),
    (
        ("perturbation=none", "+perturbation.gamma=0.02"),
        "perturbation.gamma is set but perturbation=none takes no settings; choose another perturbation, or "
        "leave the settings out",
    ),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED)
def test_refuses(overrides, message):
    cfg = compose(*overrides)
    check(cfg)
    with pytest.raises(ConfigError, match="^" + re.escape(message)) as refusal:
        check_combinations(cfg)
    assert "\n" not in str(refusal.value)


ALLOWED = [
    ("schedule=wci", "measure=none"),
    ("schedule=bound", "measure=none"),
    ("schedule=wci", "optimizer=adam"),
    ("schedule=wci", TEN, "schedule.start_epoch=9"),
    ("objective=mart", "++data.mixup=0"),
    ("objective=trades", "++data.mixup=0.5"),
    ("objective=standard", "++data.mixup=0.5"),
    ("stopping=early", "data.validation_size=100", "averaging=ema"),
    ("stopping=early", "stopping.monitor=test_robust_loss"),
    ("schedule=piecewise", TEN, "schedule.milestones=[5,20]"),
    ("schedule=cosine", "schedule.length=20", TEN),
    ("averaging=swa", TEN, "averaging.start_epoch=9"),
    ("batchnorm.frozen_from=9", TEN, "averaging=ema", "method=awp"),
    ("measure.inputs=clean", "objective=at"),
    ("averaging=swa", "measure.weights=averaged", "schedule=wci"),
    ("method=nfgsm", "attack.train.relative_start=0", "measure=measures"),
    ("optimizer.nesterov=true",),
    ("optimizer=adamw", "regularizer.weight_decay_on=weights"),
]


@pytest.mark.parametrize("overrides", ALLOWED)
def test_allows(overrides):
    cfg = compose(*overrides)
    check(cfg)
    check_combinations(cfg)


def test_is_refused_before_any_data_are_read(tmp_path, monkeypatch, capsys):
    missing = ("data=cifar10", f"data.root={tmp_path / 'nothing'}", "data.download=false", "report=false")
    assert command(monkeypatch, *missing, "stopping=early", f"hydra.run.dir={tmp_path / 'run'}") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: stopping=early watches held-out training images")
    assert error.count("\n") == 1
    assert not (tmp_path / "run" / "records").exists()


QUICK = (
    *tiny_but("schedule.", "trainer.max_epochs", "measure.epochs"),
    "schedule=constant",
    "measure.epochs=[0]",
    "attack.steps=1",
    "data.test_size=20",
    "trainer.max_epochs=2",
)
LAWLESS = {
    "adam": (("optimizer=adam",), "optimizer=Adam"),
    "adamw": (("optimizer=adamw",), "optimizer=AdamW"),
    "nesterov": (("optimizer.nesterov=true",), "optimizer.nesterov=true"),
    "weights": (("regularizer.weight_decay_on=weights",), "regularizer.weight_decay_on=weights"),
    "clipped": (("+trainer.gradient_clip_val=0.5",), "trainer.gradient_clip_val=0.5"),
}
TERMS = ("posterior_variance_stationary", "curvature_term", "log_variance_term")
SUMS = ("curvature_term_top_k", "log_variance_term_top_k", "dominant_terms_top_k", "best_rate_top_k")
STATIONARY = {
    "spectrum": ("stable", *TERMS, *(f"{name}_se" for name in TERMS)),
    "bounds": ("unstable_directions", *SUMS, *(f"{name}_se" for name in SUMS)),
}


@pytest.mark.parametrize("name", LAWLESS)
def test_without_plain_momentum_no_rate_follows_its_law(name):
    with pytest.raises(
        ConfigError, match=r"^schedule BoundRate .* momentum SGD; choose optimizer=sgd, "
    ) as refusal:
        check_combinations(compose("schedule=bound", *LAWLESS[name][0]))
    assert LAWLESS[name][1].partition("=")[0] in str(refusal.value)


@pytest.mark.parametrize(
    "name",
    ["clipped", *(pytest.param(n, marks=pytest.mark.slow) for n in ("adam", "adamw", "nesterov", "weights"))],
)
def test_without_plain_momentum_everything_but_its_law_is_recorded(name, tmp_path, monkeypatch, capsys):
    overrides, culprit = LAWLESS[name]
    run_dir = tmp_path / "run"
    assert command(monkeypatch, *QUICK, *overrides, f"hydra.run.dir={run_dir}", "report=false") == 0
    log = (run_dir / "log.jsonl").read_text()
    assert log.count("WARNING") == log.count("the stationary laws recorded are those of momentum SGD") == 1
    for table, columns in STATIONARY.items():
        found = rows(run_dir, table)
        assert {row["epoch"] for row in found} == {0, 1}
        for row in found:
            assert {column for column, value in row.items() if value is None} == set(columns), table
    for table in ("wci", "layers", "alignment"):
        assert {row["epoch"] for row in rows(run_dir, table)} == {0, 1}
    assert not (run_dir / "records" / "posterior.jsonl").exists()

    capsys.readouterr()
    assert posterior_command([str(run_dir)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(
        f"error: {run_dir}: trained with {culprit}, but the posterior is that of momentum SGD"
    )
    assert error.count("\n") == 1
    assert not (run_dir / "records" / "posterior.jsonl").exists()


@pytest.mark.slow  # draws figures
def test_the_report_of_a_run_without_a_law_says_what_it_lacks(tmp_path, monkeypatch):
    assert command(monkeypatch, *QUICK, "optimizer=adamw", f"hydra.run.dir={tmp_path}") == 0
    page = (tmp_path / "report" / "index.html").read_text()
    _, _, missing = page.partition("Not drawn")
    assert "posterior" in missing[:2000]


@pytest.mark.slow  # two runs
def test_the_posterior_of_a_sweep_leaves_out_only_the_runs_without_one(tmp_path, monkeypatch, capsys):
    sweep = (
        f"hydra.sweep.dir={tmp_path}",
        "report=false",
        "trainer.max_epochs=1",
        "~measure.measurements.alignment",
    )
    assert command(monkeypatch, *QUICK, "-m", "optimizer=adam,sgd", *sweep) == 0
    (plain,) = tmp_path.glob("*optimizer=sgd*")
    written = rows(plain, "posterior")
    (plain / "records" / "posterior.jsonl").unlink()
    capsys.readouterr()
    assert posterior_command([str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert said.err.count("error: ") == 1
    assert "trained with optimizer=Adam" in said.err
    assert said.out == f"{plain}: {len(written)} rows\n"
    assert rows(plain, "posterior") == written
