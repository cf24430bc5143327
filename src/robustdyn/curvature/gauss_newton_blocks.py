"""Diagonal Hessian blocks of piecewise linear networks through the Gauss-Newton identity.

If the outputs are piecewise linear in one weight tensor while the others are held (ReLU, BatchNorm on running
statistics, no sharing), then the Hessian block of that tensor has no second-derivative-of-the-network term:
H_kk = J_kᵀ Λ J_k, with Λ the second derivative of an example's loss by its K outputs. With Λ = L Lᵀ,

    Tr(H_kk) = (1/m) Σ_x Σ_c ‖J_{k,x}ᵀ L_x e_c‖²

needs reverse passes only, one for each output, or unbiased with random signs ξ in place of the e_c. For
cross-entropy Λ = diag(p) − p pᵀ and L = diag(√p) − p √pᵀ. For any other loss that is convex in the outputs
(squared error, smoothed labels, ...) autograd gives Λ, and its eigenvectors give L.

Shapes: m examples, b examples in a chunk, K outputs of an example, L measured tensors.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from robustdyn.curvature.empirical_risk import EmpiricalRisk
from robustdyn.curvature.example_gradients import SquaredGradientNorms, UnsupportedPassError
from robustdyn.curvature.linearity import (
    GradientAccess,
    Overwrites,
    nonlinearity,
    stray_use,
)
from robustdyn.curvature.probes import child, gaussian, rademacher
from robustdyn.curvature.risk_function import cross_entropy
from robustdyn.curvature.tape import gradients

_BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)
_LAYERS = (nn.Conv2d, nn.Linear, *_BATCHNORMS)  # those that may own measured parameters
_MIXED = "what an example gives depends on which others pass through the model with it"
# How far a squared gradient norm and autograd's may differ, relatively: rounding stays some orders below.
_FORMULA_TOLERANCE = {torch.float32: 1e-2, torch.float64: 1e-6}


def identity_obstacle(risk: EmpiricalRisk, names: tuple[str, ...], generator: torch.Generator) -> str | None:
    """Why the identity (or our per-layer formulas) cannot be used for these tensors; None if it can.

    The structure is checked: loss, BatchNorm mode, layers, sharing, and the graph that the first and the last
    example record. The estimators check every chunk's graph again, because a forward method may branch on
    its input.

    Args:
        risk: The risk whose Hessian blocks are wanted.
        names: The measured tensors.
        generator: For the random direction in which our formulas are compared with autograd.
    """
    # each process looks at its own examples, and all follow the first that finds an obstacle
    # and draw from generators of their own: one that stops early must not move the common one
    return risk.shards.first_complaint(_own_obstacle(risk, names, child(generator)))


def _own_obstacle(risk: EmpiricalRisk, names: tuple[str, ...], generator: torch.Generator) -> str | None:
    obstacle = _structural_obstacle(risk, names)
    if obstacle is not None:
        return obstacle
    try:
        return _layer_formula_obstacle(risk, names, generator)
    except UnsupportedPassError as error:
        return str(error)


def exact_squared_norms(risk: EmpiricalRisk, names: tuple[str, ...]) -> tuple[Tensor, int]:
    """Σ_c ‖J_{k,x}ᵀ L_x e_c‖² for every example and tensor.

    Returns:
        (m, L) float64 on the CPU, whose mean over examples is Tr(H_kk); and the reverse passes used, K.

    Raises:
        UnsupportedPassError: On some chunk the identity does not hold.
    """
    classes = number_of_outputs(risk)

    def rows() -> Iterator[Tensor]:
        with risk.guard(), SquaredGradientNorms(_modules(risk), names, classes) as norms:
            for inputs, targets in risk.chunks():
                _inspect(risk, names, norms, inputs)
                inputs, outputs = _forward(risk, norms, inputs)
                columns = _loss_factor(risk, outputs, targets).unbind(dim=2)
                for c, column in enumerate(columns):
                    _reverse(inputs, outputs, column, last=c == classes - 1)
                yield norms.totals.cpu()

    return _gathered(risk, rows()), classes


def sampled_squared_norms(
    risk: EmpiricalRisk, names: tuple[str, ...], probes: int, generator: torch.Generator
) -> tuple[Tensor, int]:
    """The same in expectation, from ``probes`` random sign vectors per example, averaged over probes.

    Returns:
        (m, L) float64 on the CPU, and the reverse passes used.

    Raises:
        UnsupportedPassError: On some chunk the identity does not hold.
    """
    classes = number_of_outputs(risk)
    # Drawn for all examples at once, so that the numbers depend neither on chunk_size nor on the shards.
    everybody = rademacher((probes, risk.examples, classes), generator, risk.dtype, torch.device("cpu"))
    signs = risk.rows_of_chunks(everybody[:, risk.shards.own], dim=1)

    def rows() -> Iterator[Tensor]:
        with risk.guard(), SquaredGradientNorms(_modules(risk), names, probes) as norms:
            for chunk, (inputs, targets) in zip(signs, risk.chunks(), strict=True):
                _inspect(risk, names, norms, inputs)
                inputs, outputs = _forward(risk, norms, inputs)
                factor = _loss_factor(risk, outputs, targets)
                for probe, xi in enumerate(chunk.to(risk.device)):
                    _reverse(inputs, outputs, (factor @ xi[:, :, None])[:, :, 0], last=probe == probes - 1)
                yield norms.totals.cpu() / probes

    return _gathered(risk, rows()), probes


def example_gradient_norms(risk: EmpiricalRisk, names: tuple[str, ...]) -> Tensor:
    """‖∇_k ℓ_i‖² of every example and tensor, from one reverse pass.

    Returns:
        (m, L) float64 on the CPU.

    Raises:
        UnsupportedPassError: On some chunk the formulas of the layers do not hold.
    """

    def rows() -> Iterator[Tensor]:
        with risk.guard(), SquaredGradientNorms(_modules(risk), names, 1) as norms:
            for inputs, targets in risk.chunks():
                _inspect(risk, names, norms, inputs)
                inputs, outputs = _forward(risk, norms, inputs)
                leaf = outputs.detach().requires_grad_()
                (slopes,) = gradients(risk.losses_of(leaf, targets).sum(), (leaf,))
                _reverse(inputs, outputs, slopes, last=True)
                yield norms.totals.cpu()

    return _gathered(risk, rows())


def _gathered(risk: EmpiricalRisk, rows: Iterator[Tensor]) -> Tensor:
    """The rows of all processes (m, L).

    Raises:
        UnsupportedPassError: On all processes, if one raised it.
    """
    own, complaint = torch.zeros(0), None
    try:
        own = torch.cat(list(rows))
    except UnsupportedPassError as error:
        complaint = str(error)
    complaint = risk.shards.first_complaint(complaint)
    if complaint is not None:
        raise UnsupportedPassError(complaint)
    return risk.shards.rows(own)


def number_of_outputs(risk: EmpiricalRisk) -> int:
    """K, from one example's outputs."""
    inputs, _ = risk.subset(slice(0, 1))
    with risk.guard(), torch.no_grad():
        return risk.outputs(risk.parameters(), inputs)[0].numel()


def _loss_factor(risk: EmpiricalRisk, outputs: Tensor, targets: Tensor) -> Tensor:
    """L (b, K, K) with L Lᵀ = Λ, the second derivative of each example's loss by its outputs (b, K) or (b,).

    Raises:
        UnsupportedPassError: Λ has a negative eigenvalue, so that there is no L.
    """
    outputs = outputs.detach()
    if risk.loss is cross_entropy and outputs.dim() == 2 and _sum_to_one(targets):
        p = outputs.softmax(dim=1)
        return torch.diag_embed(p.sqrt()) - p[:, :, None] * p.sqrt()[:, None, :]
    outputs.requires_grad_()
    (slopes,) = gradients(risk.losses_of(outputs, targets).sum(), (outputs,), differentiable=True)
    rows = [
        gradients(slope, (outputs,), differentiable=True)[0].detach().reshape(len(outputs), -1)
        if slope.requires_grad
        else outputs.new_zeros(len(outputs), outputs[0].numel())  # the loss is linear in the outputs
        for slope in slopes.reshape(len(outputs), -1).sum(dim=0)
    ]
    values, vectors = torch.linalg.eigh(torch.stack(rows, dim=2).double())
    rounding = torch.finfo(risk.dtype).eps ** 0.5 * values.abs().amax(dim=1, keepdim=True)
    if bool((values < -rounding).any()):
        raise UnsupportedPassError("the loss is not convex in the model's outputs")
    factor: Tensor = vectors * values.clamp(min=0.0).sqrt()[:, None, :]
    return factor.to(risk.dtype)


def _sum_to_one(targets: Tensor) -> bool:
    """Whether every target has the weight one: classes, or probabilities that sum to one."""
    if targets.is_floating_point():
        return bool(torch.allclose(targets.sum(dim=-1), targets.new_ones(())))
    return not bool((targets < 0).any())


def _modules(risk: EmpiricalRisk) -> dict[str, nn.Module]:
    return dict(risk.model.named_modules())


def _forward(risk: EmpiricalRisk, norms: SquaredGradientNorms, inputs: Tensor) -> tuple[Tensor, Tensor]:
    # Only the inputs require gradients: autograd then keeps no layer inputs and forms no weight gradients.
    inputs = inputs.detach().requires_grad_()
    norms.begin(len(inputs), inputs.device)
    logits = risk.outputs(risk.parameters(), inputs)
    norms.check_used_once()
    return inputs, logits


def _inspect(
    risk: EmpiricalRisk,
    names: tuple[str, ...],
    norms: SquaredGradientNorms,
    inputs: Tensor,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Check on the graph that the identity holds for these examples; inputs, logits and weights are on it.

    A pass with a random half of the examples checks that examples do not mix.

    Raises:
        UnsupportedPassError: It does not, or the graph does not show that it does.
    """
    leaves = risk.leaves()
    half = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))[: (len(inputs) + 1) // 2]
    half = half.to(inputs.device)
    norms.begin(len(half), inputs.device)
    alone = risk.outputs(leaves, inputs[half].requires_grad_())
    inputs = inputs.detach().requires_grad_()
    norms.begin(len(inputs), inputs.device)
    with GradientAccess() as access, Overwrites() as overwrites:
        logits = risk.outputs(leaves, inputs)
    norms.check_used_once()
    if not isinstance(logits, Tensor) or logits.dim() not in (1, 2) or len(logits) != len(inputs):
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UnsupportedPassError(
            f"the model's output is {shape}, neither (examples, outputs) nor (examples,)"
        )
    # NaN passes here: values that are not finite are reported with the traces
    away = (alone - logits[half]).detach().abs().max()
    if bool(away > torch.finfo(risk.dtype).eps ** 0.5 * logits.detach().abs().max()):
        raise UnsupportedPassError(_MIXED)
    measured = {name: leaves[name] for name in names}
    problem = nonlinearity(logits, measured, overwrites) or stray_use(logits, measured, norms.nodes())
    if access.found:
        problem = f"the forward pass uses a tensor's {access.found}, so that a hook may change its gradient"
    if problem is not None:
        raise UnsupportedPassError(problem)
    return inputs, logits, measured


def _reverse(inputs: Tensor, logits: Tensor, cotangent: Tensor, *, last: bool) -> None:
    torch.autograd.grad(logits, inputs, cotangent.view_as(logits), retain_graph=not last)


# ---------------------------------------------------------------------- structure


def _structural_obstacle(risk: EmpiricalRisk, names: tuple[str, ...]) -> str | None:
    if risk.batchnorm == "train" and risk.has_batchnorm:
        return "BatchNorm uses batch statistics"
    if not risk.independent:
        return _MIXED
    if not isinstance(risk.inputs, Tensor) or not risk.inputs.is_floating_point():
        return "the inputs are not one tensor of floating-point numbers"
    if not risk.separable:
        return "the loss of an example depends on the outputs of others"
    return _module_obstacle(risk.model) or _sharing_obstacle(risk.model) or _owner_obstacle(risk.model, names)


def _module_obstacle(model: nn.Module) -> str | None:
    for name, module in model.named_modules():
        kind = type(module)
        own = {key for key, parameter in module._parameters.items() if parameter is not None}
        if kind in _LAYERS:
            # BatchNorm's mode is the guard's business, so its present flag does not matter here.
            if not own <= {"weight", "bias"}:
                return f"{kind.__name__} {name!r} has reparametrised weights"
            if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
                return f"{kind.__name__} {name!r} has forward hooks or a forward method of its own"
        elif own:
            return f"{kind.__name__} {name!r} owns parameters that no known layer uses"
    return None


def _sharing_obstacle(model: nn.Module) -> str | None:
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            first = owners.setdefault(id(parameter), name)
            if first != name:
                return f"layers {first!r} and {name!r} share a parameter"
    return None


def _owner_obstacle(model: nn.Module, names: tuple[str, ...]) -> str | None:
    modules = dict(model.named_modules())
    for name in names:
        owner = name.rpartition(".")[0]
        if owner not in modules or type(modules[owner]) not in _LAYERS:
            return f"{name!r} does not belong to a known layer"
    return None


# ---------------------------------------------------------------------- numbers


def _layer_formula_obstacle(
    risk: EmpiricalRisk, names: tuple[str, ...], generator: torch.Generator
) -> str | None:
    """Compare every tensor's squared gradient norm, for one example of a pair, with autograd's.

    Finds batches that mix examples, and guards our formulas.
    """
    ends = slice(0, risk.held, max(1, risk.held - 1))  # the first and the last
    with risk.guard(), SquaredGradientNorms(_modules(risk), names, 1) as norms:
        inputs, logits, leaves = _inspect(risk, names, norms, risk.subset(ends)[0])
        seed = torch.zeros_like(logits)
        seed[0] = gaussian(tuple(logits.shape[1:]), generator, risk.dtype, risk.device)
        wanted = [inputs, *leaves.values()]
        found = torch.autograd.grad(logits, wanted, seed, allow_unused=True, materialize_grads=True)[1:]
    truth = torch.stack([g.double().square().sum() for g in found])
    tolerance = _FORMULA_TOLERANCE[risk.dtype]
    wrong = (norms.totals[0] - truth).abs() > tolerance * truth
    wrong |= norms.totals[1:].sum(dim=0) > tolerance * truth
    if bool(wrong.any()):
        culprit = names[int(wrong.nonzero()[0])]
        return f"the per-example gradient of {culprit!r} does not follow from its layer's input and output"
    return None
