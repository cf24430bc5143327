"""Diagonal Hessian blocks of piecewise linear networks through the Gauss-Newton identity.

If the logits are piecewise linear in one weight tensor while the others are held (ReLU, BatchNorm on running
statistics, no sharing), and the loss is cross-entropy, then the Hessian block of that tensor has no
second-derivative-of-the-network term: H_kk = J_kᵀ Λ J_k with Λ = diag(p) − p pᵀ for each example. With
Λ = L Lᵀ, L = diag(√p) − p √pᵀ,

    Tr(H_kk) = (1/m) Σ_x Σ_c ‖J_{k,x}ᵀ L_x e_c‖²

needs reverse passes only, one for each class, or unbiased with random signs ξ in place of the e_c.

Shapes: m examples, b examples in a chunk, K classes, L measured tensors.
"""

import torch
from torch import Tensor, nn

from robustdyn.curvature.empirical_risk import EmpiricalRisk, cross_entropy
from robustdyn.curvature.example_gradients import SquaredGradientNorms, UnsupportedPassError
from robustdyn.curvature.probes import child, gaussian, rademacher
from robustdyn.curvature.tape import gradients

_BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)
_LAYERS = (nn.Conv2d, nn.Linear, *_BATCHNORMS)  # those that may own measured parameters
_PIECEWISE_LINEAR = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.Hardtanh,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.Flatten,
    nn.Unflatten,
    nn.Identity,
    nn.Sequential,
    nn.ModuleList,
    nn.ModuleDict,
)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)

_CHECKED_TENSORS = 4
# How far vᵀH_kk v and vᵀG_kk v may differ, relatively. In exact arithmetic they agree; rounding stays some
# orders below these (TensorFloat-32 included), a smooth activation is some orders above.
_IDENTITY_TOLERANCE = {torch.float32: 1e-2, torch.float64: 1e-6}


def identity_obstacle(risk: EmpiricalRisk, names: tuple[str, ...], generator: torch.Generator) -> str | None:
    """Why the identity (or our per-layer formulas) cannot be used for these tensors; None if it can.

    The structure is checked first: loss, BatchNorm mode, module types, sharing. What module inspection cannot
    see, such as ``F.silu`` in a forward method, is found numerically, on at most two examples.

    Args:
        risk: The risk whose Hessian blocks are wanted.
        names: The measured tensors.
        generator: For the random directions of the numerical check.
    """
    # each process looks at its own examples, and all follow the first that finds an obstacle
    # and draw from generators of their own: one that stops early must not move the common one
    return risk.shards.first_complaint(_own_obstacle(risk, names, child(generator)))


def _own_obstacle(risk: EmpiricalRisk, names: tuple[str, ...], generator: torch.Generator) -> str | None:
    obstacle = _structural_obstacle(risk, names)
    if obstacle is not None:
        return obstacle
    try:
        return _layer_formula_obstacle(risk, names, generator) or _curvature_obstacle(risk, names, generator)
    except UnsupportedPassError as error:
        return str(error)


def exact_squared_norms(risk: EmpiricalRisk, names: tuple[str, ...]) -> tuple[Tensor, int]:
    """Σ_c ‖J_{k,x}ᵀ L_x e_c‖² for every example and tensor.

    Returns:
        (m, L) float64 on the CPU, whose mean over examples is Tr(H_kk); and the reverse passes used, K.
    """
    rows = []
    classes = number_of_classes(risk)
    with risk.guard(), SquaredGradientNorms(_modules(risk), names, classes) as norms:
        for inputs, _ in risk.chunks():
            inputs, logits = _forward(risk, norms, inputs)
            p = logits.detach().softmax(dim=1)
            for c in range(classes):
                # L e_c = √p_c (e_c − p)
                cotangent = -p * p[:, c : c + 1].sqrt()
                cotangent[:, c] += p[:, c].sqrt()
                _reverse(inputs, logits, cotangent, last=c == classes - 1)
            rows.append(norms.totals.cpu())
    return risk.shards.rows(torch.cat(rows)), classes


def sampled_squared_norms(
    risk: EmpiricalRisk, names: tuple[str, ...], probes: int, generator: torch.Generator
) -> tuple[Tensor, int]:
    """The same in expectation, from ``probes`` random sign vectors per example, averaged over probes.

    Returns:
        (m, L) float64 on the CPU, and the reverse passes used.
    """
    classes = number_of_classes(risk)
    # Drawn for all examples at once, so that the numbers depend neither on chunk_size nor on the shards.
    signs = rademacher((probes, risk.examples, classes), generator, risk.dtype, torch.device("cpu"))
    signs = signs[:, risk.shards.own]
    rows = []
    with risk.guard(), SquaredGradientNorms(_modules(risk), names, probes) as norms:
        for chunk, (inputs, _) in zip(signs.split(risk.chunk_size, dim=1), risk.chunks(), strict=True):
            inputs, logits = _forward(risk, norms, inputs)
            p = logits.detach().softmax(dim=1)
            for probe, xi in enumerate(chunk.to(risk.device)):
                # L ξ = √p ∘ ξ − p (√pᵀ ξ)
                scaled = p.sqrt() * xi
                cotangent = scaled - p * scaled.sum(dim=1, keepdim=True)
                _reverse(inputs, logits, cotangent, last=probe == probes - 1)
            rows.append(norms.totals.cpu() / probes)
    return risk.shards.rows(torch.cat(rows)), probes


def number_of_classes(risk: EmpiricalRisk) -> int:
    """K, from one example's logits."""
    inputs, _ = risk.subset(slice(0, 1))
    with risk.guard(), torch.no_grad():
        return risk.outputs(risk.parameters(), inputs).shape[-1]


def _modules(risk: EmpiricalRisk) -> dict[str, nn.Module]:
    return dict(risk.model.named_modules())


def _forward(risk: EmpiricalRisk, norms: SquaredGradientNorms, inputs: Tensor) -> tuple[Tensor, Tensor]:
    # Only the inputs require gradients: autograd then keeps no layer inputs and forms no weight gradients.
    inputs = inputs.detach().requires_grad_()
    norms.begin(len(inputs), inputs.device)
    logits = risk.outputs(risk.parameters(), inputs)
    norms.check_used_once()
    return inputs, logits


def _reverse(inputs: Tensor, logits: Tensor, cotangent: Tensor, *, last: bool) -> None:
    torch.autograd.grad(logits, inputs, grad_outputs=cotangent, retain_graph=not last)


# ---------------------------------------------------------------------- structure


def _structural_obstacle(risk: EmpiricalRisk, names: tuple[str, ...]) -> str | None:
    if risk.loss is not cross_entropy:
        return "the loss is not robustdyn.curvature.cross_entropy"
    if risk.batchnorm == "train" and risk.has_batchnorm:
        return "BatchNorm uses batch statistics"
    inputs, targets = risk.inputs, risk.targets
    if not inputs.is_floating_point():
        return "the inputs are not floating-point numbers"
    if targets.is_floating_point() and not torch.allclose(targets.sum(dim=-1), targets.new_ones(())):
        return "the target probabilities do not sum to one"
    if not targets.is_floating_point() and bool((targets < 0).any()):
        return "some targets are negative, which cross-entropy ignores"
    return _module_obstacle(risk.model) or _sharing_obstacle(risk.model) or _owner_obstacle(risk.model, names)


def _module_obstacle(model: nn.Module) -> str | None:
    for name, module in model.named_modules():
        kind = type(module)
        own = {key for key, parameter in module._parameters.items() if parameter is not None}
        if kind in _LAYERS:
            # BatchNorm's mode is the guard's business, so its present flag does not matter here.
            if not own <= {"weight", "bias"}:
                return f"{kind.__name__} {name!r} has reparametrised weights"
        elif kind in _PIECEWISE_LINEAR or (kind in _DROPOUTS and not module.training):
            continue
        elif kind.__module__.startswith("torch.nn."):
            return f"{kind.__name__} {name!r} is not known to be piecewise linear"
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

    Finds weights used outside their layer's forward method, and batches that mix examples.
    """
    inputs, _ = risk.subset(slice(0, 2))
    with risk.guard(), SquaredGradientNorms(_modules(risk), names, 1) as norms:
        inputs = inputs.detach().requires_grad_()
        norms.begin(len(inputs), inputs.device)
        leaves = risk.leaves()
        logits = risk.outputs(leaves, inputs)
        if logits.dim() != 2:
            return f"the model's output has shape {tuple(logits.shape)}, not (examples, classes)"
        norms.check_used_once()
        seed = torch.zeros_like(logits)
        seed[0] = gaussian((logits.shape[1],), generator, risk.dtype, risk.device)
        wanted = [inputs, *(leaves[name] for name in names)]
        found = torch.autograd.grad(logits, wanted, seed, allow_unused=True, materialize_grads=True)[1:]
    truth = torch.stack([g.double().square().sum() for g in found])
    tolerance = _IDENTITY_TOLERANCE[risk.dtype]
    wrong = (norms.totals[0] - truth).abs() > tolerance * truth
    wrong |= norms.totals[1:].sum(dim=0) > tolerance * truth
    if bool(wrong.any()):
        culprit = names[int(wrong.nonzero()[0])]
        return f"the per-example gradient of {culprit!r} does not follow from its layer's input and output"
    return None


def _curvature_obstacle(
    risk: EmpiricalRisk, names: tuple[str, ...], generator: torch.Generator
) -> str | None:
    """Compare vᵀ H_kk v by double backward with vᵀ J_kᵀ Λ J_k v, for a few tensors.

    The first tensor is upstream of every activation, so it alone would find most smooth ones.
    """
    inputs, _ = risk.subset(slice(0, 2))
    last = len(names) - 1
    chosen = sorted({round(i * last / max(1, _CHECKED_TENSORS - 1)) for i in range(_CHECKED_TENSORS)})
    with risk.guard():
        leaves = risk.leaves()
        logits = risk.outputs(leaves, inputs)
        p = logits.detach().softmax(dim=1)
        # The least likely class as target makes the term that must vanish as large as it can be.
        loss = cross_entropy(logits, p.argmin(dim=1)).sum()
        for name in (names[i] for i in chosen):
            leaf = leaves[name]
            direction = gaussian(tuple(leaf.shape), generator, risk.dtype, risk.device)
            hessian = _second_derivative(loss, leaf, direction)
            change = _directional_derivative(logits, leaf, direction)
            centred = change - (p * change).sum(dim=1, keepdim=True)
            gauss_newton = float((p * centred.square()).sum())
            if not abs(hessian - gauss_newton) <= _IDENTITY_TOLERANCE[risk.dtype] * gauss_newton:
                return (
                    f"on {name!r} the Hessian ({hessian:.4g}) and Gauss-Newton ({gauss_newton:.4g}) forms "
                    "differ: the network is not piecewise linear in it"
                )
    return None


def _second_derivative(loss: Tensor, leaf: Tensor, direction: Tensor) -> float:
    (gradient,) = gradients(loss, (leaf,), differentiable=True)
    (product,) = gradients((gradient * direction).sum(), (leaf,), differentiable=True)
    return float((product.detach() * direction).sum())


def _directional_derivative(logits: Tensor, leaf: Tensor, direction: Tensor) -> Tensor:
    """J v by two reverse passes: rᵀ J v is linear in r, and its derivative with respect to r is J v."""
    r = torch.zeros_like(logits, requires_grad=True)
    (pulled,) = torch.autograd.grad(
        logits, leaf, r, create_graph=True, allow_unused=True, materialize_grads=True
    )
    return gradients((pulled * direction).sum(), (r,), differentiable=True)[0].detach()
