"""XTrace and Hutch++ against their definitions, and why XTrace scales Gaussian probes."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from robustdyn.curvature.traces import hutch_plus_plus, xtrace
from tests.curvature.reference import generator, random
from tests.curvature.test_total_trace import MATRICES, OUTLIERS, SIZE, Recording, with_spectrum, z_score
from tests.tolerances import EXACT64, MC_SIGMAS


def naive_xtrace(matrix: Tensor, probes: Tensor, *, scaled: bool = True) -> Tensor:
    """The m estimates from the definition, with one QR decomposition each; probes are (P, m)."""
    size, m = probes.shape
    estimates = []
    for i in range(m):
        others = torch.cat([probes[:, :i], probes[:, i + 1 :]], dim=1)
        q, _ = torch.linalg.qr(matrix @ others)
        left = probes[:, i] - q @ (q.T @ probes[:, i])
        if scaled:
            left = left * math.sqrt(size - m + 1) / left.norm()
        estimates.append(torch.trace(q.T @ matrix @ q) + left @ matrix @ left)
    return torch.stack(estimates)


@pytest.mark.parametrize("spectrum", MATRICES)
@pytest.mark.parametrize("products", [4, 15, 40])
def test_xtrace_is_its_definition(products, spectrum):
    operator = Recording(MATRICES[spectrum])
    m = products // 2
    result = xtrace(operator, products, generator())
    probes = torch.stack(operator.asked[:m], dim=1)
    assert not torch.equal(probes.abs(), torch.ones_like(probes))  # see the bias of signs below
    expected = naive_xtrace(operator.matrix, probes)
    assert result.estimate == pytest.approx(float(expected.mean()), rel=EXACT64["rtol"])
    assert result.standard_error == pytest.approx(float(expected.std()) / math.sqrt(m), rel=1e-8)


def test_the_scaling_takes_out_noise():
    """With outliers covered and the rest flat, the noise is in the lengths of what is left of the probes."""
    matrix = with_spectrum(torch.cat([torch.tensor([100.0, 90.0]), torch.ones(SIZE - 2)]).double())
    probes = random(100, SIZE, 6, seed=3)
    scaled = torch.stack([naive_xtrace(matrix, p).mean() for p in probes]) - matrix.trace()
    unscaled = torch.stack([naive_xtrace(matrix, p, scaled=False).mean() for p in probes]) - matrix.trace()
    assert z_score(scaled) < MC_SIGMAS
    assert scaled.square().mean() < 0.1 * unscaled.square().mean()


def test_the_scaling_would_bias_signs():
    """Why XTrace's probes are Gaussian: the exact mean over all 256 pairs of signs in four dimensions."""
    matrix = random(4, 4) + random(4, 4).T
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=8)), dtype=torch.float64).view(-1, 4, 2)
    means = {
        scaled: float(torch.stack([naive_xtrace(matrix, p, scaled=scaled).mean() for p in signs]).mean())
        for scaled in (False, True)
    }
    truth = float(matrix.trace())
    assert means[False] == pytest.approx(truth, rel=EXACT64["rtol"])
    assert abs(means[True] - truth) > 0.01 * abs(truth)


def test_hutch_plus_plus_is_its_definition():
    operator = Recording(OUTLIERS)
    result = hutch_plus_plus(operator, 20, generator())
    sketch = torch.stack(operator.asked[:6], dim=1)
    assert_close(sketch.abs(), torch.ones_like(sketch))
    q, _ = torch.linalg.qr(OUTLIERS @ sketch)
    off = torch.eye(SIZE, dtype=torch.float64) - q @ q.T
    probes = torch.stack(operator.asked[12:], dim=1)
    assert_close(off @ probes, probes, **EXACT64)
    forms = (probes * (OUTLIERS @ probes)).sum(dim=0)
    expected = float((q.T @ OUTLIERS @ q).trace() + forms.mean())
    assert result.estimate == pytest.approx(expected, rel=EXACT64["rtol"])
    assert result.standard_error == pytest.approx(float(forms.std()) / math.sqrt(8), rel=EXACT64["rtol"])
    assert (result.probes, result.deflated, result.products) == (8, 6, 20)
