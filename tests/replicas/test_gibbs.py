import copy

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from robustdyn.replicas import StackedNetwork
from robustdyn.replicas.gibbs import AttackedNetworks, GibbsSampling, WeightPosterior
from robustdyn.streams import generator
from tests.replicas.problems import EXAMPLES, attack, images, network
from tests.tolerances import MC_SIGMAS


def basis(numel, k):
    draws = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(numel, k, generator=draws, dtype=torch.float64))[0]


def posterior(numel=6, **changes):
    settings = {
        "mean": torch.linspace(-1, 1, numel, dtype=torch.float64),
        "directions": basis(numel, 2),
        "covariance": np.array([[4.0, 1.5], [1.5, 1.0]]),
        "complement_std": 1.0,
    }
    return WeightPosterior(**(settings | changes))


def test_drawn_weights_have_the_mean_and_the_covariance():
    wanted, count = posterior(), 8_000
    drawn = wanted.draw([generator(0, "test", j) for j in range(count)]).numpy()
    u = wanted.directions.numpy()
    covariance = u @ wanted.covariance @ u.T + np.eye(6) - u @ u.T
    variance = np.diag(covariance)
    off = drawn.mean(axis=0) - wanted.mean.numpy()
    assert (np.abs(off) < MC_SIGMAS * np.sqrt(variance / count)).all()
    # Isserlis: the variance of an entry of a Gaussian sample covariance
    errors = np.sqrt((np.outer(variance, variance) + covariance**2) / count)
    assert (np.abs(np.cov(drawn.T) - covariance) < MC_SIGMAS * errors).all()


def test_weights_of_a_network_do_not_depend_on_the_others():
    one = posterior()
    rows = one.draw([generator(0, "test", j) for j in range(3)])
    assert_allclose(one.draw([generator(0, "test", 2)])[0], rows[2], rtol=1e-12)
    assert not torch.equal(rows[0], rows[1])


def gibbs(model, law, chunk, **changes):
    networks = AttackedNetworks(StackedNetwork(model, "vmapped"), changes.get("attack", attack()), seed=1)
    sampling = GibbsSampling(networks=5, examples=4)
    return networks.gibbs_errors(law, *images(), sampling, chunk=chunk, stream="gibbs")


def noisy(model):
    numel = sum(p.numel() for p in model.parameters())
    centre = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    return posterior(numel, mean=centre, complement_std=0.1)


@pytest.mark.parametrize(
    "threat", [attack(), attack(steps=0, eps=1.0)], ids=["attack", "random start, on which more depends"]
)
def test_errors_are_those_of_each_network_attacked_on_its_own(threat):
    model = network()
    inputs, targets = images()
    law = noisy(model)
    expected = []
    for j in range(5):
        other = copy.deepcopy(model)
        theta = law.draw([generator(1, "gibbs-weights", j)])[0]
        torch.nn.utils.vector_to_parameters(theta, other.parameters())
        which = torch.randperm(EXAMPLES, generator=generator(1, "gibbs-examples", j))[:4]
        adversarial = threat.perturb(other, inputs[which], targets[which], generator(1, "gibbs-starts", j))
        expected.append(float((other(adversarial).argmax(dim=1) != targets[which]).double().mean()))
    assert len(set(expected)) > 1
    for chunk in (1, 2, 5):
        assert_allclose(gibbs(model, law, chunk, attack=threat), expected)


def test_the_error_of_one_network_on_all_examples():
    model = network()
    inputs, targets = images()
    stacked = StackedNetwork(model, "vmapped")
    networks = AttackedNetworks(stacked, attack(), seed=1)
    got = networks.error(stacked.theta(), inputs, targets, batch_size=4, stream="fixed")
    draws = generator(1, "fixed")
    wrong = 0
    for part, labels in zip(inputs.split(4), targets.split(4), strict=True):
        adversarial = attack().perturb(model, part, labels, draws)
        wrong += int((model(adversarial).argmax(dim=1) != labels).sum())
    assert_allclose(got, wrong / EXAMPLES)
    assert 0 < got < 1


@pytest.mark.parametrize("threat", [attack(), attack(steps=0, eps=1.0)], ids=["attack", "random start"])
def test_which_examples_each_network_misclassifies(threat):
    model = network()
    inputs, targets = images()
    stacked = StackedNetwork(model, "vmapped")
    theta = noisy(model).draw([generator(0, "test", j) for j in range(3)])
    networks = AttackedNetworks(stacked, threat, seed=1)
    expected = []
    for j, row in enumerate(theta):
        other, draws = copy.deepcopy(model), generator(1, "wrong", 5 + j)
        torch.nn.utils.vector_to_parameters(row, other.parameters())
        adversarial = [
            threat.perturb(other, *part, draws)
            for part in zip(inputs.split(4), targets.split(4), strict=True)
        ]
        expected.append(other(torch.cat(adversarial)).argmax(dim=1) != targets)
    got = networks.wrong(theta, inputs, targets, batch_size=4, stream="wrong", first=5)
    assert_allclose(got, torch.stack(expected).numpy())
    assert 0 < got.mean() < 1


def test_a_network_that_says_nothing_is_wrong():
    """All-NaN logits must not count as class 0."""
    model = network()
    law = noisy(model)
    broken = WeightPosterior(
        mean=law.mean * torch.nan, directions=law.directions, covariance=law.covariance, complement_std=0.1
    )
    assert (gibbs(model, broken, 5) == 1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"directions": 2 * basis(6, 2)}, "directions must have orthonormal columns"),
        ({"covariance": np.eye(3)}, r"covariance \(2, 2\), got \(6,\) and \(3, 3\)"),
        ({"covariance": np.ones((2, 2)) - np.eye(2)}, "covariance must be positive definite"),
        ({"complement_std": 0.0}, "complement_std must be positive, got 0"),
    ],
)
def test_posteriors_that_are_none_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        posterior(**change)


def test_settings_that_cannot_be_are_refused():
    model = network()
    with pytest.raises(ValueError, match="networks must be at least 1, got 0"):
        GibbsSampling(networks=0, examples=4)
    with pytest.raises(ValueError, match="attack must have batchnorm=eval, got train"):
        gibbs(model, noisy(model), 2, attack=attack(batchnorm="train"))
    networks = AttackedNetworks(StackedNetwork(model, "looped"), attack(), seed=0)
    many = GibbsSampling(networks=1, examples=11)
    with pytest.raises(ValueError, match=f"examples must be at most {EXAMPLES}, got 11"):
        networks.gibbs_errors(noisy(model), *images(), many, chunk=1, stream="gibbs")
