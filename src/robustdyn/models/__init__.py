"""Networks; each normalises its own input and takes images in [0, 1]."""

from robustdyn.models.preact_resnet import PreActBlock, PreActResNet

__all__ = ["PreActBlock", "PreActResNet"]
