"""PreActResNet: pre-activation residual networks whose stages double in width."""

from collections.abc import Sequence

from robustdyn.models.preactivation import PreActNetwork


class PreActResNet(PreActNetwork):
    """PreActResNet with the input normalisation inside, so that attacks live on the [0, 1] pixel scale.

    With ``width=64`` and ``strides=(1, 2, 2, 2)``, ``blocks=(2, 2, 2, 2)`` make the PreActResNet-18 of Rice
    et al. (ICML 2020), with a BatchNorm before pooling (11.17 M parameters for ten classes), and
    ``blocks=(3, 4, 6, 3)`` the PreActResNet-34 (21.28 M).

    Args:
        num_classes: K.
        in_channels: Image channels C.
        width: Channels of the first stage; stage s has ``width * 2**s``.
        blocks: Number of basic blocks in each stage.
        strides: Stride of the first block in each stage.
        mean: Per-channel mean on the [0, 1] scale, length C.
        std: Per-channel standard deviation on the [0, 1] scale, length C.

    Raises:
        ValueError: Sizes that do not fit together or are not positive.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        width: int,
        blocks: Sequence[int],
        strides: Sequence[int],
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        if width < 1:
            raise ValueError(f"width must be at least 1, got {width}")
        super().__init__(
            num_classes=num_classes,
            in_channels=in_channels,
            stem=width,
            channels=[width * 2**stage for stage in range(len(blocks))],
            blocks=blocks,
            strides=strides,
            dropout=0.0,
            mean=mean,
            std=std,
        )
