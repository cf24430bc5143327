"""Checks an evaluation for signs that it overstates robustness.

The checks follow Carlini et al. (2019, "On Evaluating Adversarial Robustness", section 4 and appendix),
Athalye et al. (ICML 2018, section 3.1) and the authors of AutoAttack (``flags_doc.md`` of their package). A
warning is not a proof, and neither is the absence of warnings. A robust accuracy cannot be above the clean
one here, because an example that is wrong without an attack counts as not robust.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustdyn.attacks import summed_cross_entropy
from robustdyn.evaluation.evaluators import Note

COMPARISONS = frozenset(
    {"unbounded", "zero_gradient", "weaker_with_more_effort", "black_box", "suite_weaker"}
)
"""Checks that are made on the outcomes; the others are made while attacking."""


@dataclass(frozen=True, kw_only=True)
class Sanity:
    """The thresholds above which a sign gives a warning.

    Attributes:
        accuracy_tolerance: Differences of accuracies up to this give no warning.
        logit_tolerance: Differences up to this between two passes over the same images, relative to the norm
            of an example's logits, give no warning.
        unbounded_accuracy: An attack in an unbounded ball that leaves more than this share of the examples
            right is suspect.

    Raises:
        ValueError: A negative tolerance.
    """

    accuracy_tolerance: float
    logit_tolerance: float
    unbounded_accuracy: float

    def __post_init__(self) -> None:
        for key in ("accuracy_tolerance", "logit_tolerance", "unbounded_accuracy"):
            if not getattr(self, key) >= 0:
                raise ValueError(f"{key} must be at least 0, got {getattr(self, key)}")

    def check_model(self, model: nn.Module, images: Tensor, note: Note) -> None:
        """Check the model itself on a batch (B, C, H, W); the caller has set it to eval mode."""
        training = [name or "the model" for name, module in model.named_modules() if module.training]
        if training:
            note(
                "train_mode",
                f"{training[0]} is in train mode although eval mode was asked for ({len(training)} modules): "
                "batches or dropout may change the outcome",
            )
        with torch.no_grad():
            first, second = model(images), model(images)
        if not first.isfinite().all():
            share = 1 - first.isfinite().all(dim=1).float().mean().item()
            note("not_finite", f"{share:.1%} of the unattacked images have logits that are not finite")
            return
        scale = first.norm(dim=1).clamp_min(1e-12)
        moved = ((first - second).norm(dim=1) / scale).max().item()
        if moved > self.logit_tolerance:
            note(
                "randomised",
                f"two passes over the same images differ by {moved:.1e} of the logits' norm: attacks on a "
                "random model must average over its randomness, these do not",
            )
        in_range = first.min() >= -1e-5 and first.max() <= 1 + 1e-5
        if in_range and ((first.sum(dim=1) - 1).abs() < 1e-5).all():
            note(
                "probabilities",
                "the model returns probabilities, not logits: gradients through a softmax vanish where it is "
                "certain",
            )

    def compare(self, outcomes: Mapping[str, "AttackOutcome"]) -> Iterator[tuple[str, str, str]]:
        """Yield (check, evaluator, message) for every sign that the outcomes of all attacks show together."""
        bounded = {name: outcome for name, outcome in outcomes.items() if outcome.in_ball}
        yield from self._unbounded(outcomes)
        yield from self._gradient(outcomes)
        yield from self._effort(bounded)
        yield from self._black_box(bounded)
        yield from self._suites(bounded)

    def _unbounded(self, outcomes: Mapping[str, "AttackOutcome"]) -> Iterator[tuple[str, str, str]]:
        for name, outcome in outcomes.items():
            if not outcome.in_ball and outcome.accuracy > self.unbounded_accuracy:
                yield (
                    "unbounded",
                    name,
                    f"{outcome.accuracy:.1%} stay right although any image was allowed: the gradients "
                    "mislead the attack",
                )

    def _gradient(self, outcomes: Mapping[str, "AttackOutcome"]) -> Iterator[tuple[str, str, str]]:
        for name, outcome in outcomes.items():
            if outcome.zero_gradients:
                count, total = outcome.zero_gradients, len(outcome.robust)
                yield (
                    "zero_gradient",
                    name,
                    f"at {count} of {total} images ({count / total:.1%}) the cross-entropy has no gradient "
                    "(exactly zero, or not finite): attacks that follow it stand still there; compare with "
                    "the margin loss and black-box attacks",
                )

    def _effort(self, outcomes: Mapping[str, "AttackOutcome"]) -> Iterator[tuple[str, str, str]]:
        for name, outcome in outcomes.items():
            lighter = {other: o.accuracy for other, o in outcomes.items() if o.lighter_than(outcome)}
            best = min(lighter, key=lighter.__getitem__, default=None)
            if best is not None and outcome.accuracy > lighter[best] + self.accuracy_tolerance:
                yield (
                    "weaker_with_more_effort",
                    name,
                    f"leaves {outcome.accuracy:.1%} right, with fewer steps or restarts {best} left "
                    f"{lighter[best]:.1%}: the step size may be too large, or the gradients mislead",
                )

    def _black_box(self, outcomes: Mapping[str, "AttackOutcome"]) -> Iterator[tuple[str, str, str]]:
        white = [outcome for outcome in outcomes.values() if outcome.access == "white_box"]
        if not white:
            return
        withstands = torch.stack([outcome.robust for outcome in white]).all(dim=0)
        for name, outcome in outcomes.items():
            if outcome.access != "black_box":
                continue
            # Within AutoAttack it only gets what the white-box attacks left, alone it gets all.
            share = (withstands & ~outcome.robust).double().mean().item()
            if share > self.accuracy_tolerance:
                yield (
                    "black_box",
                    name,
                    f"without gradients it breaks {share:.1%} of the examples, which withstood all attacks "
                    "with gradients: these may be masked, and the true robust accuracy still lower",
                )

    def _suites(self, outcomes: Mapping[str, "AttackOutcome"]) -> Iterator[tuple[str, str, str]]:
        simple = {name: o.accuracy for name, o in outcomes.items() if o.tied is not None}
        best = min(simple, key=simple.__getitem__, default=None)
        for outcome in outcomes.values():
            if outcome.suite is None or best is None:
                continue
            if outcome.accuracy > simple[best] + self.accuracy_tolerance:
                yield (
                    "suite_weaker",
                    outcome.suite,
                    f"leaves {outcome.accuracy:.1%} right, {best} alone only {simple[best]:.1%}: its attacks "
                    "miss what a simpler one finds",
                )


@dataclass(frozen=True, kw_only=True)
class AttackOutcome:
    """The outcome of one attack, as the checks need it.

    Attributes:
        robust: bool (N,), for each example whether it was still right.
        access: ``"white_box"`` or ``"black_box"``; None for no attack.
        in_ball: Whether the attack kept to the threat model.
        tied: See ``Description``.
        effort: Steps and restarts.
        suite: The suite whose last attack this is, if any of its attacks follow gradients; otherwise None.
        zero_gradients: Number of images without a gradient, if this was checked.
    """

    robust: Tensor
    access: str | None
    in_ball: bool
    tied: str | None
    effort: tuple[int, int]
    suite: str | None
    zero_gradients: int

    @property
    def accuracy(self) -> float:
        """Share of the examples that is still right."""
        return self.robust.double().mean().item()

    def lighter_than(self, other: "AttackOutcome") -> bool:
        """Whether it is the same attack as ``other`` with fewer steps or restarts, and more of neither."""
        if self.tied is None or self.tied != other.tied or self.effort == other.effort:
            return False
        return all(mine <= theirs for mine, theirs in zip(self.effort, other.effort, strict=True))


def zero_gradients(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Where the input gradient of the cross-entropy is exactly zero, or not a number; bool (B,)."""
    with torch.enable_grad():
        inputs = images.detach().clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(summed_cross_entropy(model(inputs), labels), inputs)
    size = gradient.flatten(1).abs().amax(dim=1)
    return (size == 0) | ~size.isfinite()
