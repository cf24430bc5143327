import copy
import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from robustdyn.curvature import EmpiricalRisk, projected_covariance
from robustdyn.curvature.minibatch_covariance import MinibatchCovariance
from tests.cases import CASES
from tests.curvature.reference import check_operator_contract, generator, random
from tests.tolerances import EXACT32, EXACT64


def problem(name: str, examples: int) -> tuple[nn.Module, Tensor, Tensor]:
    return replace(CASES[name], examples=examples).problem()


def dense_gradients(model: nn.Module, batches: list[tuple[Tensor, Tensor]], batchnorm: str) -> Tensor:
    """Gradients (M, P) of the batches, by the calls of a training step on a copy of the model."""
    gradients = []
    for inputs, targets in batches:
        step = copy.deepcopy(model).train(batchnorm == "train")
        step.zero_grad()
        F.cross_entropy(step(inputs), targets).backward()
        gradients.append(torch.cat([p.grad.reshape(-1) for p in step.parameters()]))
    return torch.stack(gradients)


def in_order(inputs: Tensor, targets: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    full = len(inputs) // size * size
    return list(zip(inputs[:full].split(size), targets[:full].split(size), strict=True))


def covariance(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    batch_size: int,
    batchnorm: str = "eval",
    **settings: object,
) -> MinibatchCovariance:
    settings = {"batch_size": batch_size, "batchnorm": batchnorm, "generator": None, **settings}
    return MinibatchCovariance(model, inputs, targets, **settings)  # type: ignore[arg-type]


def dense(operator: MinibatchCovariance) -> Tensor:
    return operator @ torch.eye(operator.shape[0], dtype=operator.dtype)


def descending(matrix: Tensor, k: int) -> Tensor:
    return torch.linalg.eigvalsh(matrix).flip(0)[:k]


# ---------------------------------------------------------------------- against dense gradients


@pytest.mark.parametrize("batchnorm", ["eval", "train"])
@pytest.mark.parametrize("name", ["tanh_mlp", "norm_mlp", "preact"])
def test_is_the_covariance_of_training_steps(name, batchnorm):
    model, inputs, targets = problem(name, 23)  # five batches of four, three examples left over
    gradients = dense_gradients(model, in_order(inputs, targets, 4), batchnorm)
    truth = torch.cov(gradients.T)
    operator = covariance(model, inputs, targets, 4, batchnorm)
    assert (operator.batches, operator.batch_size, operator.examples) == (5, 4, 20)
    assert operator.batchnorm == batchnorm
    check_operator_contract(operator, truth)
    assert_close(operator.mean, gradients.mean(dim=0), **EXACT64)

    gram = operator.gram()
    assert torch.equal(gram, gram.T)
    assert_close(gram, (gradients - gradients.mean(0)) @ (gradients - gradients.mean(0)).T / 4, **EXACT64)
    top = operator.eigenpairs(4)
    values, vectors = torch.linalg.eigh(truth)
    assert_close(top.eigenvalues, values.flip(0)[:4], **EXACT64)
    overlaps = (top.eigenvectors.T @ vectors.flip(1)[:, :4]).abs()
    # eigenvectors are known to eps λ₁/gap, some hundred eps here
    assert_close(overlaps, torch.eye(4, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    assert_close(top.eigenvectors.T @ top.eigenvectors, torch.eye(4, dtype=torch.float64), **EXACT64)
    assert float(top.residuals.max()) < 1e-12 * float(values[-1])
    assert top.all_converged
    assert (top.products, top.restarts, top.which) == (4, 0, "largest")

    trace = operator.trace()
    assert trace.estimate == pytest.approx(float(truth.trace()), rel=1e-12)
    assert trace.batches == 5
    directions = random(operator.shape[0], 3)
    projected = operator.variances(directions)
    assert_close(projected.covariance, directions.T @ truth @ directions, **EXACT64)
    assert torch.equal(projected.variances, projected.covariance.diagonal())
    assert_close(projected.projections, gradients @ directions, **EXACT64)
    assert_close(projected.mean, gradients.mean(dim=0) @ directions, **EXACT64)
    assert projected.batches == 5


def test_batch_statistics_make_another_matrix():
    model, inputs, targets = problem("preact", 23)
    settled = covariance(model, inputs, targets, 4).trace().estimate
    batch = covariance(model, inputs, targets, 4, "train").trace().estimate
    assert abs(batch / settled - 1.0) > 0.05


def test_chunks_filters_and_float32():
    model, inputs, targets = problem("preact", 23)
    full = covariance(model, inputs, targets, 4)
    vector = random(full.shape[0])
    assert_close(covariance(model, inputs, targets, 4, chunk_size=3) @ vector, full @ vector, **EXACT64)

    names = ["conv1.weight", "linear.bias"]
    blocks = EmpiricalRisk(model, inputs, targets).blocks
    rows = torch.cat([torch.arange(full.shape[0])[blocks[name]] for name in names])
    some = covariance(model, inputs, targets, 4, parameters=names)
    check_operator_contract(some, dense(full)[rows][:, rows])

    single = covariance(model.float(), inputs.float(), targets, 4)
    image = single @ vector.float()
    assert image.dtype == single.eigenpairs(2).eigenvectors.dtype == torch.float32
    assert_close(image.double(), full @ vector, **EXACT32)
    assert_close(single.gram(), full.gram(), **EXACT32)
    vectors = single.eigenpairs(4).eigenvectors
    assert_close(vectors.T @ vectors, torch.eye(4), **EXACT32)
    assert single.eigenpairs(4).all_converged
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(covariance(model, inputs.float(), targets, 4) @ vector.float(), image)
    with torch.inference_mode():
        again = covariance(model, inputs.float().clone(), targets, 4) @ vector.float()
        assert torch.equal(again, image)
        assert not again.is_inference()


def test_wide_rows_are_worked_through_in_slabs(monkeypatch):
    model, inputs, targets = problem("preact", 23)
    whole = covariance(model, inputs, targets, 4)
    monkeypatch.setattr("robustdyn.curvature.minibatch_covariance._SLAB_NUMBERS", 5 * 37)
    slabs = covariance(model, inputs, targets, 4)
    assert_close(slabs.gram(), whole.gram(), **EXACT64)
    assert_close(slabs.eigenpairs(2).eigenvectors.abs(), whole.eigenpairs(2).eigenvectors.abs(), **EXACT64)
    directions = random(whole.shape[0], 2)
    assert_close(slabs.variances(directions).covariance, whole.variances(directions).covariance, **EXACT64)
    assert slabs.trace().estimate == pytest.approx(whole.trace().estimate, rel=1e-12)


# ---------------------------------------------------------------------- what is estimated


def partitions(examples: int, size: int) -> list[list[int]]:
    """Every set of disjoint batches, as an ordering of the examples used."""
    orders: list[tuple[int, ...]] = [()]
    for _ in range(examples // size):
        orders = [
            order + batch
            for order in orders
            for batch in itertools.combinations([e for e in range(examples) if e not in order], size)
            if not order or batch[0] > order[-size]  # each set once
        ]
    return [list(order) for order in orders]


@pytest.mark.parametrize(("examples", "size"), [(6, 2), (6, 3), (7, 3), (5, 2)])
def test_mean_over_all_partitions(examples, size):
    """E Ĉ = S₁/B exactly, leftovers or not; with n = m the factor makes it the covariance of all batches."""
    model, inputs, targets = problem("softmax", examples)
    total = torch.zeros(12, 12, dtype=torch.float64)
    first = []
    orders = partitions(examples, size)
    for order in orders:
        part = covariance(model, inputs[order], targets[order], size, train_examples=examples)
        total += dense(part)
        first.append(part.eigenpairs(1).eigenvalues[0])
    scaled = total / len(orders)

    single = dense_gradients(model, in_order(inputs, targets, 1), "eval")
    factor = 1.0 - size / examples
    assert_close(scaled, factor * torch.cov(single.T) / size, **EXACT64)
    batches = [list(which) for which in itertools.combinations(range(examples), size)]
    every = torch.stack([single[which].mean(dim=0) for which in batches])
    assert_close(scaled, torch.cov(every.T, correction=0), **EXACT64)
    # leading eigenvalues of the estimates are too large in the mean (by Jensen's inequality)
    assert torch.stack(first).mean() > 1.1 * descending(scaled, 1)[0]


def test_mean_over_all_partitions_with_batch_statistics():
    """The factor is right for the first-order part, and too small by 4/9 for the second-order part."""
    model, inputs, targets = problem("norm_mlp", 6)
    batches = [list(which) for which in itertools.combinations(range(6), 2)]
    every = dense_gradients(model, [(inputs[which], targets[which]) for which in batches], "train")
    truth = torch.cov(every.T, correction=0)

    # the part of first order is the projection on sums of functions of one example
    indicator = torch.zeros(len(batches), 6, dtype=torch.float64)
    for row, which in zip(indicator, batches, strict=True):
        row[which] = 1.0
    centred = every - every.mean(dim=0)
    linear = indicator @ torch.linalg.lstsq(indicator, centred).solution
    rest = (centred - linear).square().sum() / len(batches)
    assert 0.02 < rest / truth.trace() < 0.98  # otherwise nothing is tested

    orders = partitions(6, 2)
    total = 0.0
    for order in orders:
        part = covariance(model, inputs[order], targets[order], 2, "train", train_examples=6)
        total += part.trace().estimate
    # correlation between disjoint batches of the second order: (6−2−2 choose 0) / (6−2 choose 2) = 1/6
    expected = truth.trace() - rest + (1 - 2 / 6) * (1 - 1 / 6) * rest
    assert total / len(orders) == pytest.approx(float(expected), rel=1e-10)


def test_train_examples_scale_everything():
    model, inputs, targets = problem("preact", 23)
    plain = covariance(model, inputs, targets, 4)
    scaled = covariance(model, inputs, targets, 4, train_examples=40)
    directions = random(plain.shape[0], 2)
    assert (plain.factor, scaled.factor) == (1.0, 0.9)
    assert_close(scaled @ directions, 0.9 * (plain @ directions), **EXACT64)
    assert_close(scaled.gram(), 0.9 * plain.gram(), **EXACT64)
    assert_close(scaled.eigenpairs(3).eigenvalues, 0.9 * plain.eigenpairs(3).eigenvalues, **EXACT64)
    assert_close(scaled.eigenpairs(3).eigenvectors, plain.eigenpairs(3).eigenvectors, **EXACT64)
    few, many = scaled.trace(), plain.trace()
    assert few.estimate == pytest.approx(0.9 * many.estimate, rel=1e-12)
    assert few.standard_error == pytest.approx(0.9 * many.standard_error, rel=1e-12)
    few, many = scaled.variances(directions), plain.variances(directions)
    assert_close(few.covariance, 0.9 * many.covariance, **EXACT64)
    assert_close(few.standard_errors, 0.9 * many.standard_errors, **EXACT64)
    assert_close(few.projections, many.projections, **EXACT64)
    # a batch that is the whole training set has no noise
    assert covariance(model, inputs, targets, 4, train_examples=4).trace().estimate == 0.0


# ---------------------------------------------------------------------- standard errors


def of_gradients(gradients: Tensor) -> MinibatchCovariance:
    """A covariance from given gradients: the loss is linear in the weights, and batches have one example."""
    model = nn.Linear(gradients.shape[1], 1, bias=False).double()
    return covariance(model, gradients, torch.zeros(len(gradients)), 1, loss=lambda outputs, _: outputs[:, 0])


def test_standard_errors_are_the_jackknife():
    gradients, direction = random(7, 3), random(3, 1, seed=1)
    full = of_gradients(gradients)
    others = [[j for j in range(7) if j != left] for left in range(7)]
    without = [of_gradients(gradients[which]) for which in others]
    traces = torch.tensor([o.trace().estimate for o in without], dtype=torch.float64)
    variances = torch.stack([o.variances(direction).variances[0] for o in without])
    errors = full.trace().standard_error, float(full.variances(direction).standard_errors[0])
    for values, error in zip((traces, variances), errors, strict=True):
        expected = (6 / 7 * (values - values.mean()).square().sum()).sqrt()
        assert error == pytest.approx(float(expected), rel=1e-10)
    two = of_gradients(gradients[:2])
    assert two.trace().standard_error != two.trace().standard_error
    assert two.variances(direction).standard_errors.isnan().all()


def test_standard_errors_are_calibrated():
    """Over all samples of four batches from three unequal gradients, the mean of se² is exact."""
    atoms = torch.tensor([[0.0, 0.0], [3.0, 1.0], [0.5, -2.0]], dtype=torch.float64)
    direction = torch.tensor([[1.0], [0.5]], dtype=torch.float64)
    traces, variances = [], []
    for which in itertools.product(range(3), repeat=4):
        sample = of_gradients(atoms[list(which)])
        trace, projected = sample.trace(), sample.variances(direction)
        traces.append((trace.estimate, trace.standard_error))
        variances.append((float(projected.variances[0]), float(projected.standard_errors[0])))
    truth = torch.cov(atoms.T, correction=0)
    along = direction.T @ truth @ direction
    for pairs, matrix in ((traces, truth), (variances, along)):
        estimates, errors = torch.tensor(pairs, dtype=torch.float64).T
        assert float(estimates.mean()) == pytest.approx(float(matrix.trace()), rel=1e-12)
        excess = 2.0 * matrix.square().sum() / (3 * 2)  # 2 Tr(C²) / ((M−1)(M−2))
        assert float(errors.square().mean()) == pytest.approx(
            float(estimates.var(correction=0) + excess), rel=1e-10
        )


def test_batches_of_one_are_the_covariance_of_examples():
    model, inputs, targets = problem("tanh_mlp", 80)
    risk = EmpiricalRisk(model, inputs, targets)
    directions = random(risk.numel, 3)
    known = projected_covariance(risk, directions)
    found = covariance(model, inputs, targets, 1).variances(directions)
    assert_close(found.covariance, known.covariance, **EXACT64)
    # the two standard errors differ by terms of order 1/M
    assert_close(found.standard_errors, known.standard_errors, rtol=0.05, atol=0.0)


# ---------------------------------------------------------------------- behaviour


def test_generator_makes_the_partition():
    model, inputs, targets = problem("preact", 23)
    settings = (model, inputs, targets, 4, "train")
    one, same, other = (covariance(*settings, generator=generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(one.mean, same.mean)
    assert not torch.allclose(one.mean, other.mean)
    order = torch.randperm(23, generator=generator(1))
    given = covariance(model, inputs[order], targets[order], 4, "train")
    assert torch.equal(one.mean, given.mean)
    assert torch.equal(one.gram(), given.gram())


@pytest.mark.parametrize("batchnorm", ["eval", "train"])
@pytest.mark.parametrize("training", [True, False])
def test_measuring_leaves_no_trace(batchnorm, training):
    model, inputs, targets = problem("preact", 23)
    model.train(training)
    model.block.bn2.train(not training)
    model.linear.bias.requires_grad_(False)
    F.cross_entropy(model(inputs), targets).backward()
    state = copy.deepcopy(model.state_dict())
    gradients = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    flags = {n: m.training for n, m in model.named_modules()}
    rng, frozen = torch.get_rng_state(), inputs.clone()
    with torch.no_grad():
        operator = covariance(model, inputs, targets, 4, batchnorm, generator=generator())
        vectors = operator.eigenpairs(2).eigenvectors
        operator.variances(operator @ vectors)
        operator.trace()
        assert not torch.is_grad_enabled()
    after = model.state_dict()
    assert all(torch.equal(after[key], state[key]) for key in state)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (gradients[name] is None)
        assert gradients[name] is None or torch.equal(parameter.grad, gradients[name])
        assert parameter.requires_grad == (name != "linear.bias")
    assert {n: m.training for n, m in model.named_modules()} == flags
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(inputs, frozen)


def test_the_rows_outlive_the_weights():
    model, inputs, targets = problem("preact", 23)
    operator = covariance(model, inputs, targets, 4)
    vector = random(operator.shape[0])
    before = operator @ vector
    with torch.no_grad():
        model.linear.weight.zero_()
    assert torch.equal(operator @ vector, before)


def test_checks_are_paid_once():
    model, inputs, targets = problem("preact", 23)
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    covariance(model, inputs, targets, 2, "train")
    assert len(passes) == 11 + 3  # two for the loss's repeatability, one for the inputs' layout


def test_refusals():
    model, inputs, targets = problem("norm_mlp", 12)
    for size in (0, 13):
        with pytest.raises(ValueError, match="batch_size must be between 1 and the 12"):
            covariance(model, inputs, targets, size)
    with pytest.raises(ValueError, match="two batches; 12 examples make one of 7"):
        covariance(model, inputs, targets, 7)
    with pytest.raises(ValueError, match="first dimension"):
        covariance(model, inputs, targets[:-1], 3)
    with pytest.raises(ValueError, match="train_examples=3"):
        covariance(model, inputs, targets, 4, train_examples=3)
    with pytest.raises(ValueError, match="one chunk"):
        covariance(model, inputs, targets, 4, "train", chunk_size=2)
    with pytest.raises(ValueError, match="batchnorm must be"):
        covariance(model, inputs, targets, 4, "frozen")
    with pytest.raises(ValueError, match="Dropout is on"):
        covariance(nn.Sequential(nn.Dropout(), model).train(), inputs, targets, 4)
    broken = inputs.clone()
    broken[-1] = float("inf")
    with pytest.raises(FloatingPointError, match="not finite"):
        covariance(model, broken, targets, 4)
    operator = covariance(model, inputs, targets, 4)
    with pytest.raises(ValueError, match="directions must be"):
        operator.variances(random(operator.shape[0]))
    for k in (0, 3):
        with pytest.raises(ValueError, match="between 1 and 2 eigenpairs"):
            operator.eigenpairs(k)
    with pytest.raises(ValueError, match="float64 tensor"):
        operator.matvec(random(operator.shape[0]).float())


def test_eigenpairs_end_at_the_rank():
    # softmax regression of 3 classes on 4 inputs has gradients in a space of 2·4 dimensions
    model, inputs, targets = problem("softmax", 36)
    operator = covariance(model, inputs, targets, 3)
    assert_close(operator.eigenpairs(8).eigenvalues, descending(dense(operator), 8), **EXACT64)
    with pytest.raises(ValueError, match="rank 8"):
        operator.eigenpairs(9)
    same = covariance(model, inputs[:3].repeat(4, 1), targets[:3].repeat(4), 3)
    with pytest.raises(ValueError, match="rank 0"):
        same.eigenpairs(1)


def test_a_risk_over_other_examples():
    model, inputs, targets = problem("preact", 8)
    risk = EmpiricalRisk(model, inputs[:4], targets[:4], batchnorm="train", memory=2**30)
    _ = list(risk.tapes())  # kept graphs belong to the first examples
    other = risk.over(inputs[4:], targets[4:])
    fresh = EmpiricalRisk(model, inputs[4:], targets[4:], batchnorm="train")
    assert other.value() == fresh.value()
    with other.guard():
        assert_close(other.flatten(next(other.tapes())[0].gradient) / 4, fresh.gradient(), **EXACT64)
    assert risk.value() == EmpiricalRisk(model, inputs[:4], targets[:4], batchnorm="train").value()
    fewer = EmpiricalRisk(model, inputs[5:], targets[5:], batchnorm="train")
    assert risk.over(inputs[5:], targets[5:]).value() == fewer.value()
    whole = EmpiricalRisk(model, inputs, targets, batchnorm="train")
    assert risk.over(inputs, targets).value() == whole.value()
    with pytest.raises(ValueError, match="must agree in their first dimension"):
        risk.over(inputs[4:], targets[5:])
