"""WideResNet: three stages of pre-activation blocks, widened by a factor."""

from collections.abc import Sequence

from torch import nn

from robustdyn.models.preactivation import PreActNetwork


class WideResNet(PreActNetwork):
    """WRN-d-k of Zagoruyko & Komodakis (BMVC 2016, Table 1), with the input normalisation inside.

    A 3x3 stem with ``base_channels`` channels, then three stages of (d - 4) / 6 basic blocks with k, 2k and
    4k times as many, the last two of stride 2: 36.5 M parameters for WRN-28-10, 46.2 M for WRN-34-10 with ten
    classes. It is the network that TRADES (Zhang et al., ICML 2019), Rice et al. (ICML 2020) and AWP (Wu et
    al., NeurIPS 2020) train.

    Args:
        num_classes: K.
        in_channels: Image channels C.
        depth: d = 6n + 4 for n blocks in each stage.
        widen_factor: k.
        base_channels: Channels of the stem.
        dropout: Between the two convolutions of a block, in [0, 1); 0 for none.
        mean: Per-channel mean on the [0, 1] scale, length C.
        std: Per-channel standard deviation on the [0, 1] scale, length C.

    Raises:
        ValueError: Sizes that cannot be.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        depth: int,
        widen_factor: int,
        base_channels: int,
        dropout: float,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth must be 10, 16, 22, ... (6n + 4), got {depth}")
        if widen_factor < 1 or base_channels < 1:
            raise ValueError(
                f"widen_factor and base_channels must be at least 1, got {widen_factor} and {base_channels}"
            )
        super().__init__(
            num_classes=num_classes,
            in_channels=in_channels,
            stem=base_channels,
            channels=[base_channels * widen_factor * 2**stage for stage in range(3)],
            blocks=[(depth - 4) // 6] * 3,
            strides=[1, 2, 2],
            dropout=dropout,
            mean=mean,
            std=std,
        )
        self._initialise()

    def _initialise(self) -> None:
        """Convolutions from normal(0, 2 / (kernel area · output channels)), linear bias 0.

        As in the code of Zagoruyko & Komodakis (BMVC 2016), with the variance of He et al. (ICCV 2015, Eq.
        14). BatchNorm starts with weight 1 and bias 0 there, as in PyTorch.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.linear.bias)
