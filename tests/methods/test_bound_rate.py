"""Tests the learning rate that minimises the bound's dominating terms, by itself and in runs."""

import json

import numpy as np
import pytest

from robustdyn.methods import BoundRate
from tests.methods.test_wci_rate import two_ranks
from tests.runs import command, rows, tiny_but
from tests.tolerances import EXACT64

N, ETA = 300, 0.1


def rule(**changes):
    settings = {"start_epoch": 5, "interval": 2, "beta_per_example": 0.1, "learning_rate": ETA}
    return BoundRate(**(settings | {"lowest": 0.01, "highest": 0.5} | changes))


def row(epoch, best_rate):
    return {"epoch": epoch, "train_examples": N, "best_rate_top_k": best_rate}


def test_is_flat_up_to_the_decay_and_then_follows_between_two_rates():
    follow = rule()
    assert [follow.factor(t) for t in (0, 4.99)] == [1.0, 1.0]
    follow.observe(row(4, 0.6))
    assert follow.factor(4.99) == 1.0
    assert follow.factor(5) == pytest.approx(0.6 / (0.1 * N) / ETA, rel=1e-14)  # 0.02 of 0.1
    for epoch, best_rate, factor in ((6, 0.006, 0.01), (8, 1e9, 0.5)):
        follow.observe(row(epoch, best_rate))
        assert follow.factor(epoch + 1) == factor
    follow.observe(row(9, 0.6))  # measured for the record only
    assert follow.factor(10) == 0.5
    assert (follow.reading_epochs(10), follow.decay_epochs(10)) == ((4, 6, 8), (5,))


def test_goes_on_from_its_state():
    follow, other = rule(), rule()
    follow.observe(row(4, 0.6))
    other.load_state_dict(json.loads(json.dumps(follow.state_dict())))
    assert other.factor(5) == follow.factor(5) != 0.5
    other.load_state_dict({})  # a run that began under another rule
    assert other.factor(5) == 0.5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_refuses_to_follow_what_is_not_finite(value):
    with pytest.raises(ValueError, match=rf"cannot follow best_rate_top_k={value} of epoch 4"):
        rule().observe(row(4, value))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"start_epoch": 0}, "start_epoch must be at least 1, got 0"),
        ({"interval": 0}, "interval must be at least 1, got 0"),
        ({"beta_per_example": 0.0}, "beta_per_example must be positive, got 0.0"),
        ({"learning_rate": -0.1}, "learning_rate must be positive, got -0.1"),
        ({"lowest": 0.0}, "lowest must be positive, got 0.0"),
        ({"highest": 0.001}, "highest must be finite and at least lowest=0.01, got 0.001"),
        ({"highest": float("inf")}, "highest must be finite and at least lowest=0.01, got inf"),
    ],
)
def test_refuses_settings_outside_their_range(setting, message):
    with pytest.raises(ValueError, match=message):
        rule(**setting)


EPOCHS, START, BETA_PER_EXAMPLE = 6, 2, 20.0  # a rate at which this network trains
BOUND = (
    *tiny_but("schedule.", "measure.epochs", "trainer.max_epochs"),
    "schedule=bound",
    f"trainer.max_epochs={EPOCHS}",
    f"schedule.start_epoch={START}",
    "schedule.interval=1",
    f"schedule.beta_per_example={BETA_PER_EXAMPLE}",
    "schedule.lowest=1e-6",  # never reached, and neither is the highest
    "measure=none",
    "attack.steps=1",
    "data.test_size=20",
    "report=false",
)


def expected_rates(run_dir, base):
    """η of every epoch from the recorded curvatures and noise: 2(1 − μ)k / (β Σ γλ/(λ + ω))."""
    rates = [base] * START
    for epoch in range(START - 1, EPOCHS - 1):
        own = [r for r in rows(run_dir, "spectrum") if r["epoch"] == epoch and r["curvature"] > 0]
        lam, gamma = (np.array([r[name] for r in own]) for name in ("curvature", "gradient_noise"))
        noise = (gamma * lam / (lam + 5e-4)).sum()
        rates.append(2 * (1 - 0.9) * len(own) / (BETA_PER_EXAMPLE * 80 * noise))
    return rates


def test_the_rate_of_every_epoch_follows_the_record(tmp_path, monkeypatch):
    assert command(monkeypatch, *BOUND, f"hydra.run.dir={tmp_path}") == 0
    found = [r["lr"] for r in rows(tmp_path, "epochs")]
    np.testing.assert_allclose(found, expected_rates(tmp_path, ETA), rtol=EXACT64["rtol"])
    assert len(set(found)) == EPOCHS - START + 1
    # only what the rule reads is measured, and only where a rate follows
    assert [r["epoch"] for r in rows(tmp_path, "bounds")] == [1, 2, 3, 4]
    assert not {"wci", "alignment"} & {path.stem for path in (tmp_path / "records").iterdir()}
    assert all(r["best_rate_top_k_se"] > 0 for r in rows(tmp_path, "bounds"))


@pytest.mark.slow  # starts two processes
def test_two_ranks_step_at_the_same_rate(tmp_path):
    first, second = two_ranks(tmp_path, *BOUND)
    assert first == second  # to the bit: the weights would drift apart
    np.testing.assert_allclose(first[::3], expected_rates(tmp_path, ETA), rtol=EXACT64["rtol"])
    assert len(set(first)) == EPOCHS - START + 1
