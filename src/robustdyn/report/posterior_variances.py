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

SPREAD = {POSTERIOR_VARIANCE: f"{POSTERIOR_VARIANCE}_se"}
CAPTION = (
    "Variance of the weights along each tracked direction. From left to right: what momentum SGD would "
    "settle to at the present rate, by the papers' law; where it is on its way there, from the run's own "
    "rates, by the law of training (band: ±1 s.e.); the part of that which the rates before the last decay "
    "left; and the part injected since. The papers' law has independent batches and fixed adversarial "
    "examples. Training's law has shuffled epochs. Its attack follows the weights if the run measured that "
    "slope; otherwise the adversarial examples are fixed in it, too. The title says which. Right after a "
    "decay nearly all of the variance is left over, and it contracts as fast as slope and momentum let it. "
    "Before the first decay all of it is injected. Left out are parts below 0.1 % of the whole, and epochs "
    "where a direction has no stationary law."
)
SEEN = 1e-3  # of a variance, below which a part of it is not drawn

PANELS = {
    POSTERIOR_VARIANCE_STATIONARY: "Stationary,\npapers' law",
    POSTERIOR_VARIANCE: "Time-resolved,\ntraining's law",
    PROPAGATED_VARIANCE: "of it, propagated",
    INJECTED_VARIANCE: "of it, injected",
}


def which_slope(posterior: pd.DataFrame) -> str:
    """Which slope training's law has, in words, for all rows of the table ``posterior``."""
    follows = posterior["attack_follows"].astype(bool)
    if follows.all():
        return "attack follows the weights"
    return "in some runs the attack follows the weights" if follows.any() else "adversarial examples fixed"


def posterior_variances(posterior: pd.DataFrame, epochs: pd.DataFrame, cast: Cast) -> Figure:
    """Variance of every direction: stationary, time-resolved, and the parts of the latter where recorded.

    The slope of the time-resolved law stands above.

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
        f"Posterior variance of the weights, {{top}} directions; {which_slope(posterior)}",
        *(
            Panel(
                title, (Curve(POSTERIOR[name], spread=SPREAD.get(name)),), POSTERIOR[POSTERIOR_VARIANCE].shown
            )
            for name, title in PANELS.items()
            if name not in parts or parts[name].notna().any()
        ),
        one_scale=True,
    )
    return drawn(posterior.assign(**{name: seen[name] for name in names}), epochs, cast)
