"""Give a project on Weights & Biases a workspace that shows what robustdyn records.

``python experiments/tracking/dashboard.py ENTITY PROJECT`` adds the view and prints its address; with
``--dry-run`` it prints the view instead, and needs neither account nor network.
"""

import argparse
import importlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Panel:
    """A line plot.

    Attributes:
        title: Above the plot.
        curves: Metrics; with ``family``, columns of which every direction or layer has a curve.
        log: Whether the values' axis is logarithmic.
        x: Metric along the horizontal axis.
        family: See ``curves``.
    """

    title: str
    curves: tuple[str, ...]
    log: bool = False
    x: str = "epoch"
    family: bool = False

    @property
    def pattern(self) -> str:
        """A regular expression for the names of a family."""
        return "|".join(rf"{name}/.*" for name in self.curves)


SECTIONS: dict[str, tuple[Panel, ...]] = {
    "Robust overfitting": (
        Panel("Robust loss", ("epochs/train_robust_loss", "epochs/test_robust_loss")),
        Panel("Robust error", ("epochs/train_robust_error", "epochs/test_robust_error")),
        Panel("Robust loss gap", ("epochs/robust_loss_gap",)),
        Panel("Clean error", ("epochs/train_clean_error", "epochs/test_clean_error")),
        Panel("Learning rate", ("rates/lr",), log=True, x="rates/step"),
    ),
    "Curvature": (
        Panel("Weight-Curvature Index", ("wci/wci",)),
        Panel("Weight norm ‖W‖²", ("wci/weight_norm_sq",)),
        Panel("Hessian trace", ("wci/hessian_trace",), log=True),
        Panel("Leading Hessian eigenvalues", ("spectrum/hessian_eigenvalue",), log=True, family=True),
        Panel("Layers of the WCI", ("layers/wci_term",), family=True),
    ),
    "Gradient noise": (
        Panel("Noise along the leading directions", ("spectrum/gradient_noise",), log=True, family=True),
        Panel("Leading noise eigenvalues", ("spectrum/noise_eigenvalue",), log=True, family=True),
        Panel("Commutator, and its zero", ("alignment/commutator", "alignment/commutator_null")),
        Panel("Subspace overlap", ("alignment/subspace_overlap",)),
    ),
    "Posterior and bound": (
        Panel("Stationary variances", ("spectrum/posterior_variance_stationary",), log=True, family=True),
        Panel("Σ λσ² over the top k", ("bounds/curvature_term_top_k",)),
        Panel("−Σ ln σ² over the top k", ("bounds/log_variance_term_top_k",)),
        Panel("Their sum", ("bounds/dominant_terms_top_k",)),
    ),
    "Cost": (
        Panel("Training speed, images/s", ("timing/images_per_second",)),
        Panel("Share of time measuring", ("timing/measurement_share",)),
        Panel("Seconds per measurement", ("costs/seconds/all",)),
    ),
}
FIGURES = ("figures/robust_loss", "figures/spectrum", "figures/posterior_variance", "figures/layer_terms")


def workspace(entity: str, project: str) -> Any:
    """The view, as ``wandb_workspaces`` has it; nothing is sent.

    Raises:
        ValidationError: The installed version does not take it.
        ModuleNotFoundError: ``wandb-workspaces`` is not installed.
    """
    spaces = importlib.import_module("wandb_workspaces.workspaces")
    panels = importlib.import_module("wandb_workspaces.reports.v2")
    sections = [
        spaces.Section(name=name, panels=[_line_plot(panels, panel) for panel in content], is_open=True)
        for name, content in SECTIONS.items()
    ]
    sections.append(
        spaces.Section(name="Figures", panels=[panels.MediaBrowser(media_keys=list(FIGURES), num_columns=2)])
    )
    return spaces.Workspace(
        entity=entity,
        project=project,
        name="robustdyn",
        sections=sections,
        settings=spaces.WorkspaceSettings(x_axis="epoch", max_runs=20),
    )


def _line_plot(panels: ModuleType, panel: Panel) -> Any:
    chosen = {"metric_regex": panel.pattern} if panel.family else {"y": list(panel.curves)}
    return panels.LinePlot(title=panel.title, x=panel.x, log_y=panel.log or None, **chosen)


def outline() -> Iterator[str]:
    """The view in lines to read."""
    for name, content in SECTIONS.items():
        yield name
        for panel in content:
            curves = panel.pattern if panel.family else ", ".join(panel.curves)
            yield f"  {panel.title}: {curves} over {panel.x}{', log' if panel.log else ''}"
    yield "Figures"
    yield f"  {', '.join(FIGURES)}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("entity", help="user or team")
    parser.add_argument("project", nargs="?", default="robustdyn")
    parser.add_argument("--dry-run", action="store_true", help="print the view; send nothing")
    arguments = parser.parse_args(argv)
    try:
        view = workspace(arguments.entity, arguments.project)
    except ModuleNotFoundError:
        sys.stderr.write("error: this needs another package: pip install wandb-workspaces\n")
        return 1
    if arguments.dry_run:
        sys.stdout.writelines(f"{line}\n" for line in outline())
        return 0
    try:
        view.save()  # prints the address
    except Exception as error:
        sys.stderr.write(f"error: the view was not saved: {error}; `wandb login` first, or see --dry-run\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
