"""Networks; each normalises its own input and takes images in [0, 1]. And how to load their weights."""

from robustdyn.models.checkpoints import Layout, load_weights
from robustdyn.models.preact_resnet import PreActResNet
from robustdyn.models.preactivation import PreActBlock
from robustdyn.models.wide_resnet import WideResNet

__all__ = ["Layout", "PreActBlock", "PreActResNet", "WideResNet", "load_weights"]
