"""The figure of the posterior variances: where they would settle, where they are, and what made them."""

import pandas as pd
from matplotlib.figure import Figure

from robustdyn.records.schema import (
    INJECTED_VARIANCE,
    POSTERIOR,
    POSTERIOR_VARIANCE,
    POSTERIOR_VARIANCE_STATIONARY,
    PROPAGATED_VARIANCE,
)
from robustdyn.report.panels import Curve, Panel, over_epochs
from robustdyn.report.plotting import Cast

SEEN = 1e-3  # of a variance, below which a part of it is not drawn

PANELS = {
    POSTERIOR_VARIANCE_STATIONARY: "Stationary",
    POSTERIOR_VARIANCE: "Time-resolved",
    PROPAGATED_VARIANCE: "of it, propagated",
    INJECTED_VARIANCE: "of it, injected",
}


def posterior_variances(posterior: pd.DataFrame, epochs: pd.DataFrame, cast: Cast) -> Figure:
    """Variance of every direction: stationary, time-resolved, and the parts of the latter where recorded.

    Args:
        posterior: Tidy ``posterior`` rows.
        epochs: Tidy ``epochs`` rows.
        cast: Colours.
    """
    names = [PROPAGATED_VARIANCE, INJECTED_VARIANCE]
    parts = posterior[names]
    # zeros interrupt a line on a logarithmic axis
    seen = parts.mask(parts.le(SEEN * posterior[POSTERIOR_VARIANCE], axis=0), 0.0)
    drawn = over_epochs(
        "Posterior variance of the weights, {top} directions",
        *(
            Panel(title, (Curve(POSTERIOR[name]),), POSTERIOR[POSTERIOR_VARIANCE].shown)
            for name, title in PANELS.items()
            if name not in parts or parts[name].notna().any()
        ),
        one_scale=True,
    )
    return drawn(posterior.assign(**{name: seen[name] for name in names}), epochs, cast)
