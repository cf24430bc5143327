from dataclasses import replace

import numpy as np
import pytest

from robustdyn.replicas.memory import memory
from tests.replicas.ensembles import BATCH, MU, OMEGA, point, recorded

LAM = np.array([20.0, 8.0, 3.0])
NOISE = np.diag(0.6 * LAM)
RATES = np.array([0.01] * 60 + [0.001] * 40)
STEPS = [0, 1, 20, 50, 55, 60, 70, 90, 100]
REPLICAS = 600


def simulated(centres):
    """States (R, S, k) of momentum SGD about a centre (R, k) for each replica."""
    draws = np.random.default_rng(0)
    x, v = np.zeros((2, REPLICAS, 3))
    positions, buffers = [x], [v]
    for rate in RATES:
        g = (x - centres) * LAM + draws.standard_normal(x.shape) * np.sqrt(np.diag(NOISE) / BATCH)
        v = MU * v + g + OMEGA * x
        x = x - rate * v
        positions.append(x)
        buffers.append(v)
    return (np.stack([part[s] for s in STEPS], 1) for part in (positions, buffers))


def ensemble(centres):
    position, buffer = simulated(centres)
    start = point(np.diag(LAM), NOISE, np.zeros(3), slopes=np.diag(LAM))
    return replace(recorded(start, position, STEPS, RATES), buffer=buffer)


def test_a_linear_system_forgets_as_its_slopes_say():
    seen = ensemble(np.zeros((REPLICAS, 3)))
    for reference in (60, 100):
        found = memory(seen, reference)
        assert found.step.tolist() == [s for s in STEPS if 0 < s < reference]
        assert (np.abs(found.correlation - found.expected) < 4 * found.error).all()
        assert (found.error < 2 / np.sqrt(3 * REPLICAS)).all()
        assert (found.error > 0).all()
    # the slow direction remembers across the decay, but not the distant past
    found = memory(seen, 100)
    assert found.expected[found.step.tolist().index(90)] > 0.5
    assert abs(found.expected[0]) < 0.05


def test_slopes_along_the_path_replace_those_of_the_start():
    """The slopes at the start are wrong, and those along the path are right from step 20 on."""
    seen = ensemble(np.zeros((REPLICAS, 3)))
    wrong = point(np.diag(LAM), NOISE, np.zeros(3), slopes=3 * np.diag(LAM))
    mistaken = replace(seen, start=wrong)
    corrected = replace(mistaken, path=(seen.start, seen.start), path_steps=np.array([20, 100]))
    right, left, found = (memory(e, 100).expected for e in (seen, mistaken, corrected))
    late = memory(seen, 100).step >= 20
    np.testing.assert_allclose(found[late], right[late], rtol=1e-12)
    assert (np.abs(left[late] - right[late]) > 0.05).any()
    # the last slopes of the path are used after its end
    halfway = replace(mistaken, path=(seen.start,), path_steps=np.array([20]))
    np.testing.assert_allclose(memory(halfway, 100).expected, found, rtol=1e-12)


def test_replicas_with_places_of_their_own_do_not_forget():
    """The centres vary as much as the noise makes replicas vary, so that half of the variance remains."""
    stationary = np.sqrt(0.01 * np.diag(NOISE) / BATCH / (2 * LAM * (1 - MU)))
    centres = stationary * np.random.default_rng(1).standard_normal((REPLICAS, 3))
    found = memory(ensemble(centres), 60)
    early = found.step.tolist().index(20)
    assert found.correlation[early] == pytest.approx(0.5, abs=0.15)  # σ∞² to leading order, not yet reached
    assert abs(found.expected[early]) < 0.2  # oscillations die out by √μ a step: 0.9^20 = 0.12


def test_what_has_no_such_memory_is_refused():
    position, _ = simulated(np.zeros((REPLICAS, 3)))
    start = point(np.diag(LAM), NOISE, np.zeros(3), slopes=np.diag(LAM))
    with pytest.raises(ValueError, match="reference must be a recorded step, got 99"):
        memory(recorded(start, position, STEPS, RATES), 99)
    shuffled = recorded(start, position, STEPS, RATES, **{"sampling.replacement": False})
    with pytest.raises(ValueError, match="batches drawn with replacement"):
        memory(shuffled, 100)
    without = point(np.diag(LAM), NOISE, np.zeros(3))
    with pytest.raises(ValueError, match="slopes at the start"):
        memory(recorded(without, position, STEPS, RATES), 100)
