"""Compares the Hessian with that of another library, pyhessian."""

import contextlib
import copy
import io

import pytest
import torch
from torch import nn

from robustdyn.curvature import Hessian, hutchinson_trace, lanczos
from tests.cases import CASES
from tests.curvature.reference import dense_hessian, generator, risk_of

pyhessian = pytest.importorskip("pyhessian")

pytestmark = pytest.mark.filterwarnings("ignore:Using backward.. with create_graph:UserWarning")


@pytest.fixture(scope="module")
def problem():
    risk = risk_of(CASES["conv_norm_uneven"])
    # pyhessian averages over its own batches and calls eval(); hand it a copy and all data at once.
    other = pyhessian.hessian(
        copy.deepcopy(risk.model), nn.CrossEntropyLoss(), data=(risk.inputs, risk.targets), cuda=False
    )
    return risk, other


def test_leading_eigenvalues(problem):
    risk, other = problem
    with torch.random.fork_rng(devices=[]), contextlib.redirect_stdout(io.StringIO()):
        torch.manual_seed(0)
        theirs, _ = other.eigenvalues(maxIter=500, tol=1e-8, top_n=3)
    ours = lanczos(Hessian(risk), 3, which="magnitude", tol=1e-8, max_products=200, generator=generator())
    # its stopping rule bounds the change per iteration, not the error: 1e-4 holds with these settings
    assert sorted(theirs, reverse=True) == pytest.approx(ours.eigenvalues.tolist(), rel=1e-4)


def test_trace(problem):
    risk, other = problem
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = torch.tensor(other.trace(maxIter=60, tol=0.0))
    noise = (theirs.std() / len(theirs) ** 0.5).item()
    ours = hutchinson_trace(Hessian(risk), 60, generator())
    assert abs(theirs.mean().item() - ours.estimate) < 4 * (noise**2 + ours.standard_error**2) ** 0.5
    assert abs(theirs.mean().item() - dense_hessian(risk).trace().item()) < 4 * noise
