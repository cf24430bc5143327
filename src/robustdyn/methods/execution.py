"""How the mathematics is carried out: memory layout and compilation. Neither changes what is computed."""

import os
import shutil
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor, nn

from robustdyn.curvature.memory_layout import trains_channels_last
from robustdyn.errors import ConfigError

Compilation = Literal["none", "default", "reduce-overhead", "max-autotune"]
COMPILATIONS: tuple[Compilation, ...] = ("none", "default", "reduce-overhead", "max-autotune")

_GRAPHS: tuple[Compilation, ...] = ("reduce-overhead", "max-autotune")  # modes that replay CUDA graphs
_MOST_PASSES = 64  # compiled at a time; a run has 5 to 12


class Execution:
    """Prepares a network for fast steps.

    A compiled network is compiled once for each pass that differs in kind: the attack's (gradient of the
    images alone), the descent's (gradient of the weights alone; a weight perturbation's ascent is the same
    pass) and the one without gradients. Each serves the whole run. Batches smaller than the largest so far,
    such as an epoch's last, run uncompiled instead of being compiled for their own size.

    Attributes:
        replays_graphs: Whether a GPU replays CUDA graphs. What a replay returns is overwritten by later ones.

    Args:
        channels_last: Whether images and convolution weights have the channels innermost. Random numbers do
            not depend on it.
        compile: Mode of ``torch.compile``, or ``"none"``; ``"reduce-overhead"`` replays CUDA graphs.

    Raises:
        ValueError: An unknown mode.
    """

    def __init__(self, *, channels_last: bool, compile: Compilation) -> None:
        if compile not in COMPILATIONS:
            raise ValueError(f"compile must be one of {', '.join(COMPILATIONS)}, got {compile}")
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        self._compile: Compilation = compile
        self.replays_graphs = compile in _GRAPHS
        self._largest: dict[str, int] = {}

    def prepare(self, model: nn.Module) -> None:
        """Lay out the weights and arrange for compilation, which happens when the network is first used.

        Where channels-last is unsafe on a CPU, the layout stays contiguous.

        Raises:
            ConfigError: Compilation was requested, but there is no C++ compiler.
        """
        if not trains_channels_last(model):
            self._layout = torch.contiguous_format
        for parameter in model.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=self._layout)
        if self._compile == "none":
            return
        if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
            raise ConfigError(
                f"execution.compile={self._compile} needs a C++ compiler and there is none; install g++, or "
                "set execution.compile=none"
            )
        from torch._dynamo import config as dynamo  # here, because both take seconds
        from torch._inductor import list_mode_options

        # With more passes PyTorch continues uncompiled and only warns. TRADES with a validation split may
        # have its default, 8, and a run resumed at a short batch has more.
        dynamo.recompile_limit = max(dynamo.recompile_limit, _MOST_PASSES)
        # of a fixed size: with the batch size left open the code is slower
        options = dict(list_mode_options(self._compile))
        if not trains_channels_last(model):  # the compiler would put the channels innermost by itself
            options["layout_optimization"] = False
        model.compile(options=options, dynamic=False)

    def images(self, images: Tensor) -> Tensor:
        """``images`` (B, C, H, W) in this layout; inputs of another number of dimensions as they are."""
        return images.contiguous(memory_format=self._layout) if images.dim() == 4 else images

    def step(self, examples: int, split: str) -> AbstractContextManager[object]:
        """Scope of one training or evaluation step on so many ``examples`` of ``split``.

        Code is compiled for a split's whole batches; a last short one runs uncompiled.
        """
        if self._compile == "none":
            return nullcontext()
        torch.compiler.cudagraph_mark_step_begin()
        self._largest[split] = max(examples, self._largest.get(split, 0))
        return nullcontext() if examples == self._largest[split] else self.eager()

    def repeated(self, model: nn.Module) -> nn.Module:
        """``model`` for passes that need nothing of the pass before, such as those of an attack.

        One CUDA graph then serves all of them. Otherwise each pass of a step would have a graph of its own,
        because a graph also fixes what earlier ones of the step left in memory.
        """
        return _Repeated(model) if self.replays_graphs else model

    def eager(self) -> AbstractContextManager[object]:
        """Scope in which the network runs uncompiled, for products that differentiate twice."""
        # nothing is switched where nothing is compiled: the switch alone loads the compiler, for seconds
        if self._compile == "none":
            return nullcontext()
        scope: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
        return scope


class _Repeated(nn.Module):
    """Each pass of the network may overwrite what the one before it returned."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        outputs: Tensor = self.model(images)
        return outputs


def keep_layout(optimizer: torch.optim.Optimizer) -> None:
    """State that ``optimizer`` loads takes the memory layout of its parameter.

    A checkpoint's momentum has the layout of the run that wrote it. PyTorch's fused optimisers go through
    memory in order and ignore the strides, so that another layout silently gives wrong steps (2.13, on a
    CPU).
    """
    optimizer.register_load_state_dict_post_hook(_lay_out_state)


def _lay_out_state(optimizer: torch.optim.Optimizer) -> None:
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                like = torch.empty_like(parameter, dtype=value.dtype, device=value.device)
                state[name] = like.copy_(value)
