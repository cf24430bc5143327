from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from robustdyn.curvature import EmpiricalRisk, Hessian, LayerTraces, hutchinson_trace, lanczos, layer_traces
from tests.cases import CASES
from tests.curvature.obstacles import LATE, OBSTACLES, Functional
from tests.curvature.reference import PIECEWISE_LINEAR, dense_hessian, generator, random, risk_of
from tests.tolerances import EXACT64, MC_SIGMAS

SEEDS = (0, 1, 2)


def traces_of(risk: EmpiricalRisk, **changes: object) -> LayerTraces:
    settings = {
        "method": "auto",
        "probes": 4,
        "exact_classes_up_to": 10,
        "generator": generator(),
        "weights_only": False,
    }
    return layer_traces(risk, **{**settings, **changes})


def dense_traces(risk: EmpiricalRisk, names: tuple[str, ...]) -> torch.Tensor:
    diagonal = dense_hessian(risk).diagonal()
    return torch.stack([diagonal[risk.blocks[name]].sum() for name in names])


def image_risk(model: nn.Module, **changes: object) -> EmpiricalRisk:
    targets = torch.tensor([0, 1, 2, 0, 1])
    return EmpiricalRisk(model.double().eval(), random(5, 2, 6, 6), targets, **changes)


# ---------------------------------------------------------------------- whole trace


@pytest.mark.parametrize("seed", SEEDS)
def test_hutchinson_trace(seed):
    risk = risk_of(CASES["tanh_mlp"])
    result = hutchinson_trace(Hessian(risk), 64, generator(seed))
    truth = dense_hessian(risk).trace().item()
    assert abs(result.estimate - truth) < MC_SIGMAS * result.standard_error
    assert (result.probes, result.products) == (64, 64)
    assert result == pytest.approx(result)
    again = hutchinson_trace(Hessian(risk), 64, generator(seed))
    assert (again.estimate, again.standard_error) == (result.estimate, result.standard_error)


def test_hutchinson_needs_two_probes():
    with pytest.raises(ValueError, match="at least 2"):
        hutchinson_trace(Hessian(risk_of(CASES["softmax"])), 1, generator())


# ---------------------------------------------------------------------- Gauss-Newton route


@pytest.mark.parametrize("case", PIECEWISE_LINEAR, ids=lambda c: c.name)
def test_exact_layer_traces_are_the_hessians(case):
    risk = risk_of(case)
    result = traces_of(risk)
    assert result.estimator == "gauss_newton_exact"
    assert result.names == risk.names
    assert_close(result.traces, dense_traces(risk, result.names), rtol=1e-9, atol=0.0)
    assert_close(result.per_example.mean(dim=0), result.traces, **EXACT64)
    assert_close(result.standard_errors, result.per_example.std(dim=0) / case.examples**0.5, **EXACT64)
    assert result.products == case.classes
    assert (result.traces >= 0).all()
    assert result.batchnorm == "eval"


def test_weights_only_names_kernels_and_matrices():
    result = traces_of(risk_of(CASES["preact"]), weights_only=True)
    expected = ("conv1", "block.conv1", "block.conv2", "block.shortcut.0", "linear")
    assert result.names == tuple(f"{name}.weight" for name in expected)


@pytest.mark.parametrize("name", ["preact", "norm_mlp"])
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_sampled_layer_traces(name, seed):
    risk = risk_of(CASES[name])
    exact = traces_of(risk)
    result = traces_of(risk, exact_classes_up_to=2, probes=400, generator=generator(seed))
    assert result.estimator == "gauss_newton_sampled"
    assert result.products == 400
    # Given the examples, only the probes' noise is left: recover it by repetition.
    repeats = torch.stack(
        [
            traces_of(risk, exact_classes_up_to=2, probes=20, generator=generator(100 * seed + r)).traces
            for r in range(20)
        ]
    )
    noise = repeats.std(dim=0) / 20**0.5
    assert ((repeats.mean(dim=0) - exact.traces).abs() < MC_SIGMAS * noise).all()
    assert ((result.traces - exact.traces).abs() < MC_SIGMAS * noise * 1.5).all()
    # Over examples and probes together the standard error can only be larger than over examples, on average.
    assert result.standard_errors.sum() > 0.5 * exact.standard_errors.sum()


def test_sampled_numbers_do_not_depend_on_the_chunks():
    model, inputs, targets = CASES["preact"].problem()
    results = [
        traces_of(EmpiricalRisk(model, inputs, targets, chunk_size=size), exact_classes_up_to=2)
        for size in (None, 1, 2)
    ]
    for other in results[1:]:
        assert_close(other.per_example, results[0].per_example, **EXACT64)


def test_gram_and_direct_forms_agree(monkeypatch):
    """Wide layers on small images take the Gram form, and small work spaces cut the examples."""
    from robustdyn.curvature import example_gradients

    model = nn.Sequential(
        nn.Conv2d(2, 12, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 3),
    )
    risk = image_risk(model)
    forms = []
    original = example_gradients._conv2d_weight

    def spy(conv, inputs, deltas, passes, cache):
        result = original(conv, inputs, deltas, passes, cache)
        forms.append("gram" in cache)
        return result

    monkeypatch.setattr(example_gradients, "_conv2d_weight", spy)
    monkeypatch.setattr(example_gradients, "_WORKSPACE", {"cpu": 500})
    result = traces_of(risk)
    assert set(forms) == {True, False}
    assert_close(result.traces, dense_traces(risk, result.names), rtol=1e-9, atol=0.0)


def test_linear_layer_on_sequences():
    class Tokens(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, width), nn.Linear(width, 3)

        def forward(self, x):
            return self.b(self.a(x.flatten(1, 2)).relu().mean(dim=1))

    for width in (2, 40):  # direct and Gram form
        risk = image_risk(Tokens(width))
        result = traces_of(risk)
        assert result.estimator == "gauss_newton_exact"
        assert_close(result.traces, dense_traces(risk, result.names), rtol=1e-9, atol=0.0)


def test_soft_targets_keep_the_identity():
    model, inputs, _ = CASES["relu_mlp"].problem()
    soft = random(len(inputs), 3).softmax(dim=1)
    risk = EmpiricalRisk(model, inputs, soft)
    result = traces_of(risk)
    assert result.estimator == "gauss_newton_exact"
    assert_close(result.traces, dense_traces(risk, result.names), rtol=1e-9, atol=0.0)
    twice = traces_of(EmpiricalRisk(model, inputs, 2 * soft))  # weights of two, not probabilities
    assert_close(twice.traces, 2 * result.traces, **EXACT64)


def test_float32_preact_takes_the_exact_route():
    model, inputs, targets = CASES["preact"].problem()
    double = traces_of(EmpiricalRisk(model, inputs, targets))
    single = traces_of(EmpiricalRisk(model.float(), inputs.float(), targets))
    assert single.estimator == "gauss_newton_exact"
    assert_close(single.traces, double.traces, rtol=1e-4, atol=1e-6)


def test_an_input_changed_in_place_is_noticed():
    from robustdyn.curvature.example_gradients import SquaredGradientNorms, UnsupportedPassError

    layer, inputs = nn.Linear(4, 3).double().requires_grad_(False), random(5, 4).requires_grad_()
    with SquaredGradientNorms({"a": layer}, ("a.weight",), passes=1) as norms:
        norms.begin(5, inputs.device)
        hidden = inputs * 1.0
        outputs = layer(hidden)
        hidden.add_(1.0)
        with pytest.raises(UnsupportedPassError, match="'a' is changed in place"):
            torch.autograd.grad(outputs.sum(), inputs)
    assert not layer._forward_hooks


# ---------------------------------------------------------------------- when the identity fails


@pytest.mark.parametrize("name", OBSTACLES)
def test_obstacles_lead_to_hutchinson_with_the_reason(name, caplog):
    build, reason = OBSTACLES[name]
    torch.manual_seed(0)  # in a few draws of Mixing the four ReLUs are dead on the examples looked at
    # examples that depend on each other are refused in several chunks
    risk = image_risk(build(), chunk_size=None if name == "mixing" else 2)
    risk.inputs[2, 0, 0, 0] = LATE
    result = traces_of(risk, probes=2)
    assert result.estimator == "hutchinson"
    assert result.per_example is None
    assert result.products == 2 * len(result.names)
    assert result.reason in caplog.text
    with pytest.raises(ValueError, match=reason):
        traces_of(risk, method="gauss_newton")


def test_piecewise_linear_functions_keep_the_route():
    assert traces_of(image_risk(Functional(F.leaky_relu))).estimator == "gauss_newton_exact"


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(reduction="none"),
        lambda z, y: F.cross_entropy(z, y, reduction="none"),
        lambda z, y: F.nll_loss(z.log_softmax(1), y, reduction="none"),
    ],
    ids=["module", "function", "by hand"],
)
def test_cross_entropy_is_recognised_however_it_is_called(loss):
    model, inputs, targets = CASES["relu_mlp"].problem()
    result = traces_of(EmpiricalRisk(model, inputs, targets, loss=loss))
    assert result.estimator == "gauss_newton_exact"
    assert_close(result.traces, traces_of(EmpiricalRisk(model, inputs, targets)).traces, **EXACT64)


CONVEX = {
    "weighted": nn.CrossEntropyLoss(reduction="none", weight=torch.tensor([1.0, 2.0, 3.0]).double()),
    "smoothed": nn.CrossEntropyLoss(reduction="none", label_smoothing=0.1),
    "ignoring": nn.CrossEntropyLoss(reduction="none", ignore_index=1),
    "sharpened": lambda z, y: F.cross_entropy(2 * z, y, reduction="none"),
    "squared error": lambda z, y: (z - F.one_hot(y, 3)).square().mean(dim=1),
    "huber": lambda z, y: F.huber_loss(z, F.one_hot(y, 3).double(), reduction="none", delta=0.3).sum(dim=1),
    "linear": lambda z, y: z.sum(dim=1),
}


@pytest.mark.parametrize("loss", CONVEX.values(), ids=CONVEX)
def test_losses_that_are_convex_in_the_outputs_keep_the_route(loss):
    model, inputs, targets = CASES["relu_mlp"].problem()
    risk = EmpiricalRisk(model, inputs, targets, loss=loss)
    result = traces_of(risk)
    assert result.estimator == "gauss_newton_exact"
    assert_close(result.traces, dense_traces(risk, result.names), **EXACT64)


def test_regression_with_one_output_keeps_the_route():
    model, inputs, _ = CASES["relu_mlp"].problem()
    regression = nn.Sequential(model, nn.Linear(3, 1), nn.Flatten(0)).double()
    risk = EmpiricalRisk(regression, inputs, inputs.sum(dim=1), loss=nn.MSELoss(reduction="none"))
    result = traces_of(risk)
    assert result.estimator == "gauss_newton_exact"
    assert result.products == 1
    assert_close(result.traces, dense_traces(risk, result.names), **EXACT64)


def test_many_outputs_of_another_loss_are_sampled():
    model, inputs, targets = CASES["relu_mlp"].problem()
    risk = EmpiricalRisk(model, inputs, targets, loss=CONVEX["smoothed"])
    repeats = [traces_of(risk, exact_classes_up_to=2, probes=20, generator=generator(r)) for r in range(20)]
    assert {result.estimator for result in repeats} == {"gauss_newton_sampled"}
    found = torch.stack([result.traces for result in repeats])
    noise = found.std(dim=0) / len(found) ** 0.5
    # the last layer's have no noise at all: allow for rounding
    assert ((found.mean(dim=0) - traces_of(risk).traces).abs() < MC_SIGMAS * noise + 1e-10).all()


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (lambda z, y: 1 - z.softmax(dim=1)[range(len(y)), y], "not convex"),
        (lambda z, y: (z - z.flip(0)).square().sum(dim=1), "depend"),
    ],
    ids=["one minus the probability", "of pairs"],
)
def test_other_losses_are_estimated_with_the_reason(loss, reason):
    model, inputs, targets = CASES["relu_mlp"].problem()
    result = traces_of(EmpiricalRisk(model, inputs, targets, loss=loss), probes=2)
    assert result.estimator == "hutchinson"
    assert reason in result.reason


def test_fitted_examples_in_float32_keep_the_route():
    """The loss of the first examples is below 1e-6, where differences of two forms are rounding alone."""
    model, inputs, targets = CASES["relu_mlp"].problem()
    with torch.no_grad():
        list(model.modules())[-1].weight.mul_(120)
        targets[:2] = model(inputs[:2]).argmax(dim=1)
    risk = EmpiricalRisk(model.float(), inputs.float(), targets)
    with risk.guard(), torch.no_grad():
        assert risk.losses(risk.parameters(), *risk.subset(slice(0, 2))).max() < 1e-6
    assert traces_of(risk).estimator == "gauss_newton_exact"


@pytest.mark.parametrize("name", ["relu_mlp", "tanh_mlp"])
def test_the_same_under_inference_mode(name):
    risk = risk_of(CASES[name])
    expected = traces_of(risk).traces
    with torch.inference_mode():
        found = traces_of(risk).traces
    assert_close(found, expected, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("name", ["relu_mlp", "tanh_mlp"])
def test_a_late_example_without_a_number_is_an_error(name):
    model, inputs, targets = CASES[name].problem()
    risk = EmpiricalRisk(model, inputs, targets, chunk_size=2)
    risk.inputs[-1] = torch.nan
    with pytest.raises(FloatingPointError, match="is not finite"):
        traces_of(risk)


@pytest.mark.parametrize("channels", [4, pytest.param(16, marks=pytest.mark.slow)])
def test_second_derivatives_of_group_norm_on_images(channels):
    """In the channels-last layout PyTorch's own kernel reads memory that is not its own, and may crash."""
    model = nn.Sequential(
        nn.Conv2d(2, channels, 3),
        nn.GroupNorm(2, channels),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * channels, 3),
    )
    risk = image_risk(model)
    assert not risk.channels_last
    result = traces_of(risk, probes=400)
    truth = dense_traces(risk, result.names)
    assert ((result.traces - truth).abs() < MC_SIGMAS * result.standard_errors).all()


def test_batch_statistics_are_an_obstacle():
    model, inputs, targets = CASES["preact"].problem()
    batch = traces_of(EmpiricalRisk(model, inputs, targets, batchnorm="train"), probes=2)
    assert "batch statistics" in batch.reason
    assert batch.batchnorm == "train"


@pytest.mark.parametrize("name", ["tanh_mlp", "norm_mlp"])
@pytest.mark.parametrize("seed", SEEDS)
def test_layer_hutchinson(name, seed):
    risk = risk_of(CASES[name])
    result = traces_of(risk, method="hutchinson", probes=64, generator=generator(seed))
    truth = dense_traces(risk, result.names)
    assert result.reason == "requested"
    # A block whose Hessian is diagonal has no noise at all: allow for rounding.
    allowed = MC_SIGMAS * result.standard_errors + 1e-10 * truth.abs()
    assert ((result.traces - truth).abs() <= allowed).all()
    again = traces_of(risk, method="hutchinson", probes=64, generator=generator(seed))
    assert torch.equal(again.traces, result.traces)


@pytest.mark.parametrize("right", [True, False], ids=["right pairs", "wrong pairs"])
def test_known_pairs_take_noise_out_and_no_bias_in(right):
    risk = risk_of(CASES["tanh_mlp"])
    dense = dense_hessian(risk)
    known = lanczos(Hessian(risk), 6, which="magnitude", tol=1e-8, max_products=200, generator=generator(1))
    if not right:  # any orthonormal vectors and any values must work
        vectors = torch.linalg.qr(random(risk.numel, 6, seed=5))[0]
        known = replace(known, eigenvectors=vectors, eigenvalues=random(6, seed=6))
    truth = torch.stack([dense.diagonal()[risk.blocks[name]].sum() for name in risk.names])
    plain = traces_of(risk, method="hutchinson", probes=400, generator=generator(2))
    deflated = traces_of(risk, method="hutchinson", probes=400, generator=generator(2), known=known)
    assert ((deflated.traces - truth).abs() < MC_SIGMAS * deflated.standard_errors).all()
    assert (plain.deflated, deflated.deflated) == (0, 6)
    # regression over 400 probes cannot lose more than some 1/400; right pairs, of both signs, gain
    assert (deflated.standard_errors < 1.02 * plain.standard_errors).all()
    if right:
        assert deflated.standard_errors.square().sum() < 0.8 * plain.standard_errors.square().sum()


def test_negative_traces_are_left_negative():
    """A concave loss: every trace is negative and stays so."""
    model = nn.Linear(4, 1).double()
    risk = EmpiricalRisk(model, random(6, 4), random(6), loss=lambda z, y: -((z[:, 0] - y) ** 2))
    result = traces_of(risk, probes=2)
    assert (result.traces < 0).all()


def test_refusals():
    risk = risk_of(CASES["relu_mlp"])
    with pytest.raises(ValueError, match="method must be"):
        traces_of(risk, method="diagonal")
    with pytest.raises(ValueError, match="at least 2"):
        traces_of(risk, method="hutchinson", probes=1)
    with pytest.raises(ValueError, match="positive"):
        traces_of(risk, exact_classes_up_to=1, probes=0)
    biases = risk_of(CASES["relu_mlp"], parameters=lambda name, p: p.dim() == 1)
    with pytest.raises(ValueError, match="no convolution kernel"):
        traces_of(biases, weights_only=True)


def test_the_error_of_a_sum_keeps_the_correlation_between_tensors():
    model, inputs, targets = CASES["preact"].problem()
    result = traces_of(EmpiricalRisk(model, inputs, targets))
    values = result.per_example[:, [0, 2]].sum(dim=1)
    expected = float((values - values.mean()).square().sum() / (len(values) - 1) / len(values)) ** 0.5
    assert result.sum_standard_error([0, 2]) == pytest.approx(expected, rel=1e-12)
    probed = traces_of(EmpiricalRisk(model, inputs, targets), method="hutchinson", probes=3)
    independent = float(probed.standard_errors[[0, 2]].square().sum()) ** 0.5
    assert probed.sum_standard_error([0, 2]) == pytest.approx(independent, rel=1e-12)
