"""Draw the README's figure from the runs of the demo, whose folder is the argument: multirun/demo/DATE."""

import sys
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from robustdyn.records import combine, find_runs
from robustdyn.report import style

NAMES = {"method=at": "AT", "method=awp": "AWP", "method=wci_lr": "WCI-LR"}
PANELS = {"test_robust_loss": "Robust loss on test images", "robust_loss_gap": "Robust loss: test − training"}
FIRST = 25  # the last epoch before the decay; both panels then use their whole height for what follows
PICTURE = Path(__file__).parents[2] / "docs" / "images" / "demo_robust_loss"


@style.styled
def draw(epochs: pd.DataFrame) -> Figure:
    """The loss and the gap of each method after the decay, averaged over three evaluated epochs."""
    figure = style.new_figure("Robust overfitting after the decay of the learning rate", 3.2)
    panels = figure.subplots(1, 2)
    for panel, (column, title) in zip(panels, PANELS.items(), strict=True):
        for colour, (run, name) in zip(style.PALETTE, NAMES.items(), strict=False):
            rows = epochs[epochs["run"] == run].set_index("epoch")[column].loc[FIRST:].dropna()
            panel.plot(rows.index, rows, color=colour, linewidth=0.8, alpha=0.35)
            smooth = rows.rolling(3, center=True, min_periods=1).mean()
            panel.plot(smooth.index, smooth, color=colour, linewidth=2.4, label=name)
            panel.annotate(name, (smooth.index[-1] + 1, smooth.iloc[-1]), color=colour, va="center")
        panel.set(title=title, xlabel="epoch", ylabel="nats", xlim=(FIRST, 80))
    return figure


if __name__ == "__main__":
    for written in style.save(draw(combine(find_runs(sys.argv[1]), "epochs")), PICTURE):
        if written.suffix == ".pdf":
            written.unlink()  # the documentation shows the PNG
