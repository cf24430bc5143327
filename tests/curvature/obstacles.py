"""Networks for which the Hessian's layer traces are not those of the Gauss-Newton matrix, and the reasons."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.cases import PreActNet

LATE = 0.25  # the first pixel of an example in the middle of the set


class Functional(PreActNet):
    def __init__(self, activation) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x):
        out = self.activation(self.bn(self.block(self.conv1(x))))
        return self.linear(F.avg_pool2d(out, 3).flatten(1))


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(72, 3)

    def forward(self, x):
        return self.head(self.conv(self.conv(x).relu()).flatten(1))


class Borrowed(nn.Module):
    """Uses a layer's weight outside the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(72, 72), nn.Linear(72, 3)

    def forward(self, x):
        hidden = self.a(x.flatten(1)).relu()
        return self.b(hidden + F.linear(hidden, self.a.weight))


class Beside(Borrowed):
    """Uses a layer's weight outside the layer, on the network's input."""

    def forward(self, x):
        x = x.flatten(1)
        return self.b(self.a(x).relu() + F.linear(x, self.a.weight))


class Branching(Borrowed):
    """Computes another function for some examples, which come late in the set."""

    def forward(self, x):
        hidden = self.a(x.flatten(1))
        late = (x[:, 0, 0, 0] == LATE)[:, None]
        return self.b(torch.where(late, F.gelu(hidden), hidden.relu()) if bool(late.any()) else hidden.relu())


class Gated(Borrowed):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(72, 72)

    def forward(self, x):
        x = x.flatten(1)
        return self.b(self.a(x) * self.gate(x).sigmoid())


class Squared(Borrowed):
    def forward(self, x):
        hidden = self.a(x.flatten(1))
        return self.b(hidden * hidden)


class Divided(Borrowed):
    def forward(self, x):
        hidden = self.a(x.flatten(1)).relu()
        return self.b(hidden / (1 + hidden.sum(dim=1, keepdim=True)))


class Late(nn.Module):
    """The layer that is registered first acts last."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.stem = nn.Linear(8, 3), nn.Linear(72, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        x = F.gelu(self.stem(x.flatten(1)))
        for block in self.blocks:
            x = block(x).relu() + x
        return self.head(x)


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 72), nn.ReLU(), nn.Linear(72, 3))
    model[1].register_forward_hook(lambda module, inputs, output: output.clamp(max=1.0))
    return model


def hooks_its_gradient(x: Tensor) -> Tensor:
    out = x.relu()
    if out.requires_grad:
        out.register_hook(lambda gradient: 2 * gradient)
    return out


def hooks_its_node(x: Tensor) -> Tensor:
    out = x.relu()
    if out.requires_grad:
        out.grad_fn.register_prehook(lambda gradients: (2 * gradients[0],))
    return out


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.head = nn.Parameter(torch.ones(72)), nn.Linear(72, 3)

    def forward(self, x):
        return self.head(self.scale * x.flatten(1))


class Mixing(nn.Module):
    """Subtracts the batch mean, so that examples depend on each other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(72, 4), nn.Linear(4, 3)

    def forward(self, x):
        hidden = self.a(x.flatten(1)).relu()
        return self.b(hidden - hidden.mean(dim=0))


class MixingLate(Mixing):
    """Does so for some examples only, which come late in the set."""

    def forward(self, x):
        late = bool((x[:, 0, 0, 0] == LATE).any())
        return super().forward(x) if late else self.b(self.a(x.flatten(1)).relu())


class Relu(torch.autograd.Function):
    """A softplus, whatever its name."""

    @staticmethod
    def forward(ctx, x):
        y = F.softplus(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, slopes):
        (y,) = ctx.saved_tensors
        return slopes * -torch.expm1(-y)


class Overwrite(Relu):
    """The same in place."""

    @staticmethod
    def forward(ctx, x):
        y = x.copy_(F.softplus(x))
        ctx.mark_dirty(y)
        ctx.save_for_backward(y)
        return y


def overwrites_a_part(x: Tensor) -> Tensor:
    x = x.clone()
    Overwrite.apply(x[:, :1])
    return x


def modulus(x: Tensor) -> Tensor:
    return (x + 1j * x.flip(1)).abs()


def patched() -> nn.Module:
    model = Functional(F.relu)
    weight, bias = model.linear.weight, model.linear.bias
    model.linear.forward = lambda x: F.linear(x.relu(), weight, bias)
    return model


def shared() -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 72), nn.ReLU(), nn.Linear(72, 72), nn.Linear(72, 3))
    model[3].weight = model[1].weight
    return model


def reparametrised() -> nn.Module:
    head = nn.utils.parametrizations.weight_norm(nn.Linear(72, 3))
    return nn.Sequential(nn.Flatten(), head)


OBSTACLES = {
    "module": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(72, 3), nn.Tanh()),
        "Tanh is not known to be piecewise linear, and '1.weight'",
    ),
    "function": (lambda: Functional(F.silu), "Silu is not known to be piecewise linear"),
    "reused": (Reused, "'conv' is called 2 times"),
    "borrowed": (Borrowed, "two numbers that both depend on 'a.weight'"),
    "beside": (Beside, "'a.weight' is used outside of its layer"),
    "branching": (Branching, "Gelu is not known to be piecewise linear"),
    "gated": (Gated, "Sigmoid is not known to be piecewise linear"),
    "squared": (Squared, "Mul multiplies two numbers that both depend on 'a.weight'"),
    "divided": (Divided, "Div divides by a number that depends on 'a.weight'"),
    "late": (Late, "Gelu is not known"),
    "hooked": (hooked, "Linear '1' has forward hooks"),
    "hooked tensor": (lambda: Functional(hooks_its_gradient), "uses a tensor's register_hook"),
    "hooked node": (lambda: Functional(hooks_its_node), "uses a tensor's grad_fn"),
    "owned": (Scaled, "owns parameters"),
    "named": (lambda: Functional(Relu.apply), "ReluBackward is not known to be piecewise linear"),
    "overwriting": (lambda: Functional(overwrites_a_part), "a custom function overwrites a part"),
    "modulus": (lambda: Functional(modulus), "Abs is not known to be piecewise linear"),
    "patched": (patched, "Linear 'linear' has forward hooks or a forward method of its own"),
    "mixing": (Mixing, "depends on which others pass"),
    "mixing late": (MixingLate, "depends on which others pass"),
    "shared": (shared, "share a parameter"),
    "reparametrised": (reparametrised, "parametriz|reparametrised|owns parameters|not known"),
}
