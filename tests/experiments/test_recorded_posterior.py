"""Replicas of known variance against a recorded posterior of known variance."""

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.replicas.ensembles import point, recorded

FOLDER = Path(__file__).parents[2] / "experiments" / "ground_truth"
BEGAN, EPOCH = 70, 7  # the replicas start when epoch 9 has ended
RATES = np.full(14 * EPOCH, 0.01)


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("recorded_posterior")
    sys.path.remove(str(FOLDER))
    sys.modules.pop("recorded_posterior", None)


@pytest.fixture(scope="module")
def posterior():
    """σ² = 4 and 1 after every epoch by training's law, and twice that by the papers'."""
    return pd.DataFrame(
        {
            "epoch": epoch, "step": EPOCH * (epoch + 1), "index": index,
            "posterior_variance": variance, "posterior_variance_independent": 2 * variance,
        }
        for epoch in range(14)
        for index, variance in enumerate([4.0, 1.0])
    )  # fmt: skip


@pytest.fixture(scope="module")
def ensemble():
    """400 replicas along three directions, with 1.21 times the variance that the run recorded along two."""
    position = np.random.default_rng(0).standard_normal((400, 4, 3)) * 1.1 * np.array([2.0, 1.0, 5.0])
    position[:, 0] = 0
    start = point(np.eye(3), np.eye(3), np.zeros(3), slopes=np.eye(3))
    plain = recorded(start, position, [0, 5, EPOCH, 2 * EPOCH], np.full(2 * EPOCH, 0.01))
    settings = {**plain.settings, "sampling.replacement": False, "batchnorm": "eval"}
    return replace(plain, settings=settings)


def test_ratio_at_the_ends_of_epochs(script, posterior, ensemble):
    table = script.compared(posterior, RATES, ensemble, BEGAN).set_index(["law", "steps"])
    assert table.index.tolist() == [("training", 7), ("training", 14), ("papers", 7), ("papers", 14)]
    assert table["epoch"].tolist() == [10, 11, 10, 11]
    assert set(table["directions"]) == {2}
    for (law, _), row in table.iterrows():
        # of a variance over 400 replicas ln has the standard error sqrt(2 / 399), of the mean of two 0.05
        assert np.log(row["ratio"]) == pytest.approx(np.log(1.21 if law == "training" else 0.605), abs=0.2)
        assert row["low"] < row["ratio"] < row["high"]


def test_what_cannot_be_compared_is_refused(script, posterior, ensemble):
    with pytest.raises(ValueError, match=r"record\.steps"):
        script.compared(posterior, RATES, ensemble, BEGAN + 1)
    drawn = replace(ensemble, settings={**ensemble.settings, "sampling.replacement": True})
    with pytest.raises(ValueError, match="shuffles its epochs"):
        script.compared(posterior, RATES, drawn, BEGAN)


def test_only_the_rates_of_the_run_are_compared(script, posterior, ensemble):
    decayed = np.where(np.arange(len(RATES)) < BEGAN + EPOCH, RATES, 0.001)
    assert set(script.compared(posterior, decayed, ensemble, BEGAN)["steps"]) == {EPOCH}
    with pytest.raises(ValueError, match="learning_rate"):
        script.compared(posterior, 2 * RATES, ensemble, BEGAN)
