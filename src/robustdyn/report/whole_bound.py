"""Draws Catoni's bound over all parameters, its terms and the robust gap over epochs."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from robustdyn.records.schema import CATONI, EPOCHS, ROBUST_LOSS_GAP
from robustdyn.report import style
from robustdyn.report.panels import PANEL, Curve, Panel
from robustdyn.report.plotting import Cast, group_legend, key, log_axis, mark_decays

BOUND_CAPTION = (
    "Left: the bound on the expected robust loss, for a posterior over all parameters (band: ±1 s.e.). At or "
    "above the dashed line, the largest value of the clipped loss, it says nothing. Middle: the terms that "
    "depend on the network. Right: the gap. The posterior's covariance is a function of the Hessian at fixed "
    "adversarial examples; that of training has a higher bound."
)
BOUND_ALT = "Three line panels over epochs: Catoni's bound, its terms, and the robust loss gap."
TERMS = {"kl_over_beta": "-", "empirical_loss": "-.", "curvature": ":"}
"""The terms that depend on the network, and their lines."""


def how_vacuous(catoni: pd.DataFrame) -> str:
    """Whether the bound is vacuous, in words, for all rows of the table ``catoni``."""
    vacuous = catoni["vacuous"].astype(bool)
    if vacuous.all():
        return "vacuous at every epoch"
    if not vacuous.any():
        return "vacuous at no epoch"
    return f"vacuous at {int(vacuous.sum())} of {len(vacuous)} measured epochs"


def whole_bound(catoni: pd.DataFrame, epochs: pd.DataFrame, cast: Cast) -> Figure:
    """The bound, its terms and the gap; whether it is vacuous stands above."""
    figure = style.new_figure(f"Catoni's bound over all parameters: {how_vacuous(catoni)}", PANEL + 0.3)
    bound, terms, gap = figure.subplots(1, 3)
    total = Curve(CATONI["total"], spread="total_se")
    Panel("Bound", (Curve(CATONI["loss_range"], "--", ""), total)).draw(bound, catoni, cast)
    curves = tuple(Curve(CATONI[name], line) for name, line in TERMS.items())
    Panel("Its terms", curves, "nats").draw(terms, catoni, cast)
    for ax in (bound, terms):
        log_axis(ax)
    Panel("Robust loss gap, test − train", (Curve(EPOCHS[ROBUST_LOSS_GAP], marker=""),)).draw(
        gap, epochs, cast
    )
    mark_decays([bound, terms, gap], epochs, cast)
    keys = [key(style.mathtext(CATONI[name].label), line) for name, line in TERMS.items()]
    group_legend(figure, cast, [key("c", "--"), *keys])
    return figure
