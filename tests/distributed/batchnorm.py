"""A rank of tests/distributed/test_synchronized_batchnorm.py: python -m tests.distributed.batchnorm OUT."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from robustdyn.models.sync_batchnorm import desynchronize, synchronize

SHARES = (slice(0, 2), slice(2, 7))  # uneven


class Net(nn.Module):
    """Both kinds of BatchNorm; one averages its statistics equally, one has no parameters."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.second, self.bare = nn.Linear(36, 5), nn.BatchNorm1d(5, momentum=None, affine=False)

    def forward(self, x):
        x = F.silu(self.norm(self.first(x)))
        return self.bare(self.second(x.flatten(1)))


def problem():
    torch.manual_seed(0)
    net = Net().double()
    nn.init.normal_(net.norm.weight)
    nn.init.normal_(net.norm.bias)
    x = torch.randn(7, 2, 5, 5, dtype=torch.float64)
    return net, x, torch.arange(7) % 5, [torch.randn_like(p) for p in net.parameters()]


def work(net, x, y, direction, total=lambda tensor: tensor):
    """Outputs, gradients, a product with the Hessian and the buffers, for the sum of all losses.

    ``total`` sums over the processes. What belongs to an example stays with its process.
    """
    x = x.clone().requires_grad_()
    outputs = net(x)
    net(x.detach() + 1)  # a second batch for the running statistics
    loss = F.cross_entropy(outputs, y, reduction="sum")
    parameters = list(net.parameters())
    inputs, *gradients = torch.autograd.grad(loss, [x, *parameters], create_graph=True)
    along = sum((g * v).sum() for g, v in zip(gradients, direction, strict=True))
    products = torch.autograd.grad(along, parameters)
    buffers = [b.clone() for b in net.buffers()]
    net.eval()
    return {
        "outputs": outputs.detach(),
        "input gradients": inputs.detach(),
        "gradients": [total(g.detach()) for g in gradients],
        "products": [total(p) for p in products],
        "buffers": buffers,
        "evaluated": net(x).detach(),
    }


def summed(tensor):
    dist.all_reduce(tensor)
    return tensor


def main(out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    net, x, y, direction = problem()
    synchronize(net)
    found = work(net, x[SHARES[rank]], y[SHARES[rank]], direction, summed)
    half = nn.BatchNorm2d(2)
    synchronize(half)
    found["half"] = half(x[SHARES[rank]].bfloat16()).detach()
    far = nn.BatchNorm2d(2, momentum=1.0)
    synchronize(far)
    far(x[SHARES[rank]].float() + 1000)
    found["far"] = far.running_var
    net.train()
    desynchronize(net)
    found["apart"] = net(x[SHARES[rank]]).detach()
    torch.save(found, out / f"{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    os._exit(0)
