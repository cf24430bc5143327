"""What the experiment on replicas' own places makes of children whose places are known."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from robustdyn.replicas import Directions
from tests.replicas.ensembles import BATCH, MU, OMEGA, point, recorded
from tests.tolerances import EXACT64

FOLDER = Path(__file__).parents[2] / "experiments" / "ground_truth"
LAM = np.array([20.0, 8.0, 3.0])
NOISE = np.diag(0.6 * LAM)
RATE, STEPS = 0.005, [0, 20, 200]
PARENTS, CHILDREN = 120, 3


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("own_places")
    sys.path.remove(str(FOLDER))
    for name in ("own_places", "repeated"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def law(script):
    start = point(np.diag(LAM), NOISE, np.zeros(3), slopes=np.diag(LAM))
    ensemble = recorded(start, np.zeros((2, 3, 3)), [0, 1, 200], np.full(200, RATE))
    return script.predicted(ensemble, start, RATE, STEPS)


def family(begin, centres, seed):
    """x (N, C, S, k) of children of momentum SGD from x (N, k), each about its parent's centre (N, k)."""
    draws = np.random.default_rng(seed)
    x = np.repeat(begin[:, None], CHILDREN, axis=1)
    v, found = np.zeros_like(x), [x]
    for step in range(1, STEPS[-1] + 1):
        g = (x - centres[:, None]) * LAM + draws.standard_normal(x.shape) * np.sqrt(np.diag(NOISE) / BATCH)
        v = MU * v + g + OMEGA * x
        x = x - RATE * v
        if step in STEPS:
            found.append(x)
    return np.stack(found, axis=2)


def families(centres_of_rest):
    """Where places are the rest's, children of the parent's rest strive for them and the others for none."""
    draws = np.random.default_rng(5)
    deviation = np.sqrt(RATE * np.diag(NOISE) / BATCH / (2 * LAM * (1 - MU)))
    x = 3 * deviation * draws.standard_normal((PARENTS, 3))
    centres = centres_of_rest * deviation * draws.standard_normal((PARENTS, 3))
    return {
        "whole": family(x, centres, 1),
        "rest": family(np.zeros_like(x), centres, 2),
        "tracked": family(x, np.zeros_like(x), 3),
    }


def last(table, name):
    return table[(table["family"] == name) & (table["steps_after"] == 200)].iloc[0]


def test_places_that_the_rest_sets_are_told_from_what_slopes_leave(script, law):
    table = script.rows(families(2.0), law, STEPS)
    for name, apart, like_whole in (("whole", 4.0, 1.0), ("rest", 4.0, 1.0), ("tracked", 0.0, 0.0)):
        row = last(table, name)
        # 4: centres are drawn with twice the stationary deviation; 3 % for leading order in η λ
        assert abs(row["apart"] - apart) < 4 * row["apart_error"] + 0.12
        assert abs(row["like_whole"] - like_whole) < 4 * row["like_whole_error"] + 0.03
        assert abs(row["within"] - 1) < 4 * row["within_error"]
        assert row["within_error"] < 3 * np.sqrt(2 / (3 * PARENTS * (CHILDREN - 1)))


def test_where_there_is_one_minimum_slopes_leave_what_is_found(script, law):
    table = script.rows(families(0.0), law, STEPS)
    for name in ("whole", "tracked"):
        rows = table[table["family"] == name]
        first, middle, _ = rows["apart"]
        assert first > 2 * middle  # both rates are seen
        assert (np.abs(rows["apart"] - rows["expected"]) < 4 * rows["apart_error"] + 1e-9).all()
    assert abs(last(table, "rest")["apart"]) < 4 * last(table, "rest")["apart_error"]


def test_the_law_is_that_of_a_loop_over_steps(law):
    x, v = np.ones(3), np.zeros(3)
    state, covariance = np.zeros((3, 2, 2)), []
    for step in range(1, 201):
        v = MU * v + (LAM + OMEGA) * x
        x = x - RATE * v
        for i, lam in enumerate(LAM):
            pull = lam + OMEGA
            a, b = np.array([[1 - RATE * pull, -RATE * MU], [pull, MU]]), np.array([-RATE, 1.0])
            state[i] = a @ state[i] @ a.T + NOISE[i, i] / BATCH * np.outer(b, b)
        if step in STEPS:
            covariance.append(state[:, 0, 0].copy())
            np.testing.assert_allclose(law.kept[STEPS.index(step)], np.diag(x), **EXACT64)
    np.testing.assert_allclose(law.variance[1:], covariance, **EXACT64)


def test_families_start_from_the_parts_they_name(script):
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(10, 3))[0]
    moves = [torch.randn(10) for _ in range(4)]
    found = script.starts(moves, Directions(positions=basis, forces=basis))
    mean = torch.stack(moves).mean(dim=0)
    for move, whole, rest, tracked in zip(moves, *(found[f] for f in script.FAMILIES), strict=True):
        torch.testing.assert_close(whole, move)
        torch.testing.assert_close(rest + tracked - mean, move)
        torch.testing.assert_close(basis.T @ rest, basis.T @ mean)
        outside = torch.eye(10) - basis @ basis.T
        torch.testing.assert_close(outside @ tracked, outside @ mean, atol=1e-6, rtol=1e-5)
