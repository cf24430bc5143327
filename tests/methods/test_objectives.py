import math

import pytest
import torch
from torch import nn

from robustdyn.attacks import PGD, summed_cross_entropy
from robustdyn.methods import MART, TRADES, AdversarialCrossEntropy, CrossEntropy
from robustdyn.methods.metrics import RobustMetrics
from robustdyn.streams import generator
from tests.methods import rendering
from tests.tolerances import EXACT32, EXACT64

CLASSES = 4
LOGITS = nn.Flatten()  # a network whose images (B, K, 1, 1) are its logits


def network():
    """A network in train mode, so that clean and adversarial images must have separate batch statistics."""
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(12, CLASSES)
    )
    return net.double().train()


def batch(size=6):
    """Images, adversarial images, classes and other classes."""
    draw = torch.Generator().manual_seed(2)
    images = torch.rand(size, 2, 4, 4, generator=draw, dtype=torch.float64)
    adversarial = (images + 0.3 * torch.randn(images.shape, generator=draw, dtype=torch.float64)).clamp(0, 1)
    targets = torch.randint(CLASSES, (size,), generator=draw)
    return images, adversarial, targets, (targets + 1) % CLASSES


def images_of(*rows, dtype=torch.float64):
    """Images that ``LOGITS`` turns into these logits."""
    return torch.tensor(rows, dtype=dtype)[:, :, None, None]


def value_and_gradients(loss, net):
    return [loss, *torch.autograd.grad(loss, list(net.parameters()))]


REFERENCES = {
    "at": (
        AdversarialCrossEntropy(label_smoothing=0.0),
        lambda clean, robust, y: rendering.cross_entropy(robust, y),
    ),
    "at smoothed": (
        AdversarialCrossEntropy(label_smoothing=0.2),
        lambda clean, robust, y: rendering.cross_entropy(robust, y, 0.2),
    ),
    "standard": (
        CrossEntropy(label_smoothing=0.0),
        lambda clean, robust, y: rendering.cross_entropy(clean, y),
    ),
    "standard smoothed": (
        CrossEntropy(label_smoothing=0.2),
        lambda clean, robust, y: rendering.cross_entropy(clean, y, 0.2),
    ),
    "trades": (
        TRADES(beta=6.0, label_smoothing=0.0),
        lambda clean, robust, y: rendering.trades(clean, robust, y, 6.0),
    ),
    "trades smoothed": (
        TRADES(beta=1.5, label_smoothing=0.2),
        lambda clean, robust, y: rendering.trades(clean, robust, y, 1.5, 0.2),
    ),
    "mart": (MART(beta=5.0), lambda clean, robust, y: rendering.mart(clean, robust, y, 5.0)),
    "mart, no divergence": (MART(beta=0.0), lambda clean, robust, y: rendering.mart(clean, robust, y, 0.0)),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_is_its_formula_in_explicit_probabilities(name):
    objective, formula = REFERENCES[name]
    images, adversarial, targets, _ = batch()
    net = network()
    ours = value_and_gradients(objective(net, images, adversarial, targets).loss, net)
    theirs = value_and_gradients(formula(net(images), net(adversarial), targets).mean(), net)
    torch.testing.assert_close(ours, theirs, **EXACT64)


@pytest.mark.parametrize("name", REFERENCES)
def test_knows_the_logits_of_the_adversarial_images(name):
    objective, _ = REFERENCES[name]
    images, adversarial, targets, _ = batch()
    logits = objective(network(), images, adversarial, targets).robust_logits
    if name.startswith("standard"):
        assert logits is None  # there are no adversarial images
    else:
        torch.testing.assert_close(logits, network()(adversarial), **EXACT64)


def test_numbers_by_hand():
    clean = images_of([math.log(0.7), math.log(0.2), math.log(0.1)])
    robust = images_of([math.log(0.3), math.log(0.5), math.log(0.2)])
    y = torch.tensor([0])
    kl = 0.7 * math.log(7 / 3) + 0.2 * math.log(2 / 5) + 0.1 * math.log(1 / 2)
    by_hand = {
        AdversarialCrossEntropy(label_smoothing=0.0): -math.log(0.3),
        AdversarialCrossEntropy(label_smoothing=0.3): -math.log(0.3) * 0.8 - math.log(0.5 * 0.2) * 0.1,
        CrossEntropy(label_smoothing=0.0): -math.log(0.7),
        TRADES(beta=6.0, label_smoothing=0.0): -math.log(0.7) + 6 * kl,
        MART(beta=5.0): -math.log(0.3)
        - math.log(1.0001 - 0.5 + 1e-12)
        + 5 * (kl - 1e-12 * (0.7 / 0.3 + 0.2 / 0.5 + 0.1 / 0.2)) * (1.0000001 - 0.7),
    }
    for objective, number in by_hand.items():
        assert float(objective(LOGITS, clean, robust, y).loss) == pytest.approx(number, rel=EXACT64["rtol"])


def test_marts_runner_up_is_the_largest_of_the_other_classes():
    """Even if the labelled class is not the largest, no probability may be counted twice."""
    for y, runner_up in ((0, 0.5), (1, 0.3), (2, 0.5)):
        q = [0.3, 0.5, 0.2]
        same = images_of([math.log(p) for p in q])  # clean = adversarial: no divergence, up to the constants
        number = -math.log(q[y]) - math.log(1.0001 - runner_up)
        assert float(MART(beta=5.0)(LOGITS, same, same, torch.tensor([y])).loss) == pytest.approx(
            number, rel=1e-9
        )


def test_marts_constants_are_small_beside_the_papers_formula():
    images, adversarial, targets, _ = batch()
    net = network()
    ours = MART(beta=5.0)(net, images, adversarial, targets).loss
    clean, robust = net(images), net(adversarial)
    to_the_letter = rendering.mart(clean, robust, targets, 5.0, margins=False).mean()
    # ln(1.0001 − q) − ln(1 − q) < 1e-4 / (1 − q); the other two constants are below 1e-6 here
    margin = (1e-4 / (1 - rendering.probabilities(robust).amax(dim=1))).mean()
    assert 0 < to_the_letter - ours < margin + 1e-6


def test_attack_losses():
    images, adversarial, targets, _ = batch()
    net = network()
    cross_entropy = rendering.cross_entropy(net(adversarial), targets).sum()
    for objective in (AdversarialCrossEntropy(label_smoothing=0.3), MART(beta=5.0)):
        climbed = objective.attack_loss(net, images)
        torch.testing.assert_close(climbed(net(adversarial), targets), cross_entropy, **EXACT64)
    assert CrossEntropy(label_smoothing=0.0).attack_loss(net, images) is None


def test_trades_attack_climbs_the_divergence_from_the_clean_prediction():
    images, adversarial, targets, others = batch()
    net = network()
    with torch.no_grad():
        climbed = TRADES(beta=6.0, label_smoothing=0.3).attack_loss(net, images)
        p = rendering.probabilities(net(images))
    logits = net(adversarial).detach().requires_grad_()
    loss = climbed(logits, targets)
    q = rendering.probabilities(logits)
    torch.testing.assert_close(loss, rendering.divergence(p, q).sum(), **EXACT64)
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient, (q - p).detach(), **EXACT64)  # ∂KL(p ‖ softmax(z)) / ∂z, p constant
    assert climbed(logits, others) == loss
    with torch.no_grad():
        net[-1].weight.add_(1.0)  # what was predicted before the attack stays
    assert climbed(logits, targets) == loss


def test_trades_attack_raises_the_divergence_and_asks_no_labels():
    images, _, targets, others = batch()
    net = network().eval()
    pgd = PGD(
        norm="linf",
        eps=0.1,
        step_size=0.025,
        steps=10,
        random_start="gaussian",
        start_std=1e-3,
        batchnorm="eval",
    )
    with torch.no_grad():
        climbed = TRADES(beta=6.0, label_smoothing=0.0).attack_loss(net, images)
    start = pgd.start(images, generator(0, "attack"))
    found = [pgd.perturb(net, images, y, generator(0, "attack"), climbed) for y in (targets, others)]
    assert found[0].equal(found[1])
    by_labels = pgd.perturb(net, images, targets, generator(0, "attack"))
    kl = [climbed(net(x), targets).item() for x in (start, by_labels, found[0])]
    assert kl[0] < 0.01 * kl[2]
    assert kl[1] < kl[2]


@pytest.mark.parametrize(
    "smoothed",
    [
        lambda s: AdversarialCrossEntropy(label_smoothing=s),
        lambda s: CrossEntropy(label_smoothing=s),
        lambda s: TRADES(beta=6.0, label_smoothing=s),
    ],
    ids=["at", "standard", "trades"],
)
def test_smoothed_labels_share_s_among_all_classes(smoothed):
    images, adversarial, targets, _ = batch()

    def loss(s, y):
        return smoothed(s)(network(), images, adversarial, y).loss

    uniform = sum(loss(0.0, torch.full_like(targets, k)) for k in range(CLASSES)) / CLASSES
    torch.testing.assert_close(loss(0.3, targets), 0.7 * loss(0.0, targets) + 0.3 * uniform, **EXACT64)


@pytest.mark.parametrize("name", [name for name in REFERENCES if not name.startswith("mart")])
def test_probabilities_as_targets_weigh_the_losses_of_the_classes(name):
    objective, _ = REFERENCES[name]
    images, adversarial, targets, others = batch()
    lam = torch.linspace(0.1, 0.9, len(targets), dtype=torch.float64)
    eye = torch.eye(CLASSES, dtype=torch.float64)
    mixed = lam[:, None] * eye[targets] + (1 - lam)[:, None] * eye[others]
    net = network()
    ours = value_and_gradients(objective(net, images, adversarial, mixed).loss, net)
    _, formula = REFERENCES[name]
    hard = [formula(net(images), net(adversarial), y) for y in (targets, others)]
    theirs = value_and_gradients((lam * hard[0] + (1 - lam) * hard[1]).mean(), net)
    torch.testing.assert_close(ours, theirs, **EXACT64)
    assert objective.takes_probabilities


def test_probabilities_as_targets_weigh_the_attack():
    _, adversarial, targets, others = batch()
    logits = network()(adversarial)
    eye = torch.eye(CLASSES, dtype=torch.float64)
    mixed = summed_cross_entropy(logits, 0.3 * eye[targets] + 0.7 * eye[others])
    hard = [rendering.cross_entropy(logits, y).sum() for y in (targets, others)]
    torch.testing.assert_close(mixed, 0.3 * hard[0] + 0.7 * hard[1], **EXACT64)


def test_mart_needs_a_class_to_compare_with():
    assert not MART(beta=5.0).takes_probabilities


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_trades_without_beta_is_standard_training(smoothing):
    images, adversarial, targets, _ = batch()
    net = network()
    trades, standard = TRADES(beta=0.0, label_smoothing=smoothing), CrossEntropy(label_smoothing=smoothing)
    ours = value_and_gradients(trades(net, images, adversarial, targets).loss, net)
    theirs = value_and_gradients(standard(net, images, images, targets).loss, net)
    torch.testing.assert_close(ours, theirs, **EXACT64)


# Logits whose probabilities round to 0 and 1 in float32: right and wrong, clean and adversarial.
SATURATED = [(clean, robust) for clean in (1, -1, 0) for robust in (1, -1, 0) if clean or robust]


@pytest.mark.parametrize("gap", [20.0, 90.0, 300.0])
@pytest.mark.parametrize(("clean", "robust"), SATURATED)
def test_saturated_predictions_keep_value_and_gradient_in_float32(gap, clean, robust):
    """The reference uses explicit probabilities in float64, where exp(−600) is still a number."""
    y = torch.tensor([0, 1])
    direction = images_of([1.0, -1.0, 0.0], [1.0, 0.0, -1.0])
    # TRADES' gradients are differences of numbers up to β · gap, each off by 6e-8 of itself;
    # MART's have the factor 1 / (1.0001 − q), off by 6e-8 / 1e-4 of itself where q is 1
    differences = {"rtol": EXACT32["rtol"], "atol": 6.0 * gap * 1e-7}
    for objective, formula, tolerance in (
        (TRADES(beta=6.0, label_smoothing=0.0), lambda c, r: rendering.trades(c, r, y, 6.0), differences),
        (MART(beta=5.0), lambda c, r: rendering.mart(c, r, y, 5.0), {"rtol": 2e-3, "atol": 2e-3}),
    ):
        results = []
        for dtype in (torch.float32, torch.float64):
            x = (gap * clean * direction).to(dtype).requires_grad_()
            x_adv = (gap * robust * direction).to(dtype).requires_grad_()
            if dtype == torch.float32:
                loss = objective(LOGITS, x, x_adv, y).loss
            else:
                loss = formula(x.flatten(1), x_adv.flatten(1)).mean()
            results.append([g.double() for g in (loss, *torch.autograd.grad(loss, [x, x_adv]))])
        torch.testing.assert_close(*results, **tolerance)


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize(("clean", "robust"), SATURATED)
def test_no_logit_is_too_large(name, clean, robust):
    objective, _ = REFERENCES[name]
    direction = images_of([1e6, -1e6, 0.0, 0.0], [1e6, 0.0, -1e6, 0.0], dtype=torch.float32)
    x, x_adv = (clean * direction).requires_grad_(), (robust * direction).requires_grad_()
    loss = objective(LOGITS, x, x_adv, torch.tensor([0, 1])).loss
    gradients = torch.autograd.grad(loss, [x, x_adv], allow_unused=True)
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in gradients if g is not None)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TRADES(beta=-1.0, label_smoothing=0.0), "beta must be at least 0, got -1.0"),
        (lambda: TRADES(beta=math.nan, label_smoothing=0.0), "beta must be at least 0, got nan"),
        (lambda: TRADES(beta=6.0, label_smoothing=1.0), r"label_smoothing must lie in \[0, 1\), got 1.0"),
        (lambda: MART(beta=-1.0), "beta must be at least 0, got -1.0"),
        (lambda: MART(beta=math.nan), "beta must be at least 0, got nan"),
        (
            lambda: AdversarialCrossEntropy(label_smoothing=1.0),
            r"label_smoothing must lie in \[0, 1\), got 1.0",
        ),
        (
            lambda: AdversarialCrossEntropy(label_smoothing=-0.1),
            r"label_smoothing must lie in \[0, 1\), got -0.1",
        ),
        (lambda: CrossEntropy(label_smoothing=1.0), r"label_smoothing must lie in \[0, 1\), got 1.0"),
        (lambda: CrossEntropy(label_smoothing=math.nan), r"label_smoothing must lie in \[0, 1\), got nan"),
    ],
)
def test_settings_outside_their_range_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_metrics_of_mixed_targets_are_expected_ones():
    """With two batches of unequal size, the mean is over examples, not over batches."""
    metrics = RobustMetrics()
    thirds = torch.tensor([[0.6, 0.3, 0.1]]).log()
    metrics.robust.update(thirds, torch.tensor([[0.25, 0.75, 0.0]]))  # predicted: class 0, right in a quarter
    metrics.robust.update(thirds.repeat(2, 1), torch.tensor([[0.5, 0.0, 0.5], [0.0, 0.0, 1.0]]))
    losses = (
        -0.25 * math.log(0.6) - 0.75 * math.log(0.3),
        -0.5 * math.log(0.6) - 0.5 * math.log(0.1),
        -math.log(0.1),
    )
    by_hand = {"train_robust_loss": sum(losses) / 3, "train_robust_error": (0.75 + 0.5 + 1.0) / 3}
    assert metrics.compute("train") == pytest.approx(by_hand, rel=EXACT32["rtol"])  # clean: nothing was seen
    metrics.reset()
    assert metrics.compute("train") == {}


def test_metrics_of_classes_count_the_wrong_ones():
    metrics = RobustMetrics()
    logits = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.1, 0.1, 0.8]]).log()
    metrics.clean.update(logits, torch.tensor([0, 2, 2]))
    losses = -(math.log(0.6) + math.log(0.3) + math.log(0.8))
    by_hand = {"test_clean_loss": losses / 3, "test_clean_error": 1 / 3}
    assert metrics.compute("test") == pytest.approx(by_hand, rel=EXACT32["rtol"])


def test_a_loss_that_is_no_number_shows():
    metrics = RobustMetrics()
    metrics.robust.update(torch.tensor([[math.nan, 0.0]]), torch.tensor([0]))
    metrics.robust.update(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    assert math.isnan(metrics.compute("train")["train_robust_loss"])
