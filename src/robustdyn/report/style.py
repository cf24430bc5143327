"""How figures look: colours, type, saving. Touches no global matplotlib state."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

P = ParamSpec("P")

# Okabe and Ito, distinguishable with colour blindness; a dark red instead of their yellow, faint on white.
# In this order: to those who cannot see green, the pink is like the green, and the orange like the red.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#000000", "#882255", "#56B4E9", "#E69F00", "#CC79A7")
ORANGE, PINK = PALETTE[6:]
MARKERS = "os^DvPX*"
TOLD_BY_COLOUR = 4  # more lines than this have markers of different shapes, or dashes, too
DASHES = ("none", "9 3", "3 3", "9 3 3 3")  # of lines in SVG: lengths of dashes and gaps
TRAIN, TEST, VALIDATION, NEUTRAL = PALETTE[0], PALETTE[1], PALETTE[2], "#222222"
MARK = "#777777"
BAND_ALPHA = 0.3
WIDTH = 9.0  # inches: a page's width
DPI = 150

_RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10.0,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "axes.formatter.limits": (-3, 4),
    "axes.formatter.use_mathtext": True,
    "legend.frameon": False,
    "legend.fontsize": 9.0,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.0,
    "figure.titlesize": 12.0,
    "figure.titleweight": "bold",
    "figure.facecolor": "white",
    "pdf.fonttype": 42,  # text stays text
}


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw a figure under the project's style and restore matplotlib's settings afterwards."""

    @functools.wraps(draw)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with mpl.rc_context(_RC):
            return draw(*args, **kwargs)

    return wrapper


def new_figure(title: str, height: float) -> Figure:
    """An empty page-wide figure with a title, ``height`` inches high."""
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write ``stem.png`` and ``stem.pdf``, the same bytes for the same figure.

    Returns:
        The two files.
    """
    png, pdf = stem.with_suffix(".png"), stem.with_suffix(".pdf")
    with mpl.rc_context(_RC), _quiet("fontTools"):
        layout = figure.get_layout_engine()
        if layout is not None:
            layout.execute(figure)
            figure.set_layout_engine("none")  # savefig would draw twice to find the layout
        figure.savefig(png, dpi=DPI, metadata={"Software": None})
        figure.savefig(pdf, metadata={"CreationDate": None, "Producer": None, "Creator": None})
    return [png, pdf]


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Warnings only from a logger: the font library tells each step, and Hydra would print it all."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def colours(n: int) -> Sequence[str]:
    """``n`` colours that a colour-blind reader tells apart; beyond eight, shades from dark to light."""
    return PALETTE[:n] if n <= len(PALETTE) else shades(n)


def markers(n: int) -> Sequence[str]:
    """``n`` shapes of markers, used again beyond eight; empty ones where colours are enough."""
    return [MARKERS[i % len(MARKERS)] if n > TOLD_BY_COLOUR else "" for i in range(n)]


def dashes(n: int) -> Sequence[str]:
    """``n`` dash patterns of SVG lines, none where colours are enough.

    Of up to eight colours the second four are dashed. More are shades, of which neighbours differ.
    """
    every = TOLD_BY_COLOUR if n <= len(PALETTE) else 1
    return [DASHES[i // every % len(DASHES)] for i in range(n)]


def sparse(points: int, line: int = 0) -> tuple[int, int]:
    """Which of a line's points have a marker: about eight, elsewhere on each line of a panel."""
    step = max(1, points // 8)
    return line % step, step


def shades(n: int) -> Sequence[str]:
    """``n`` ordered shades, dark to light, for ranks."""
    cmap = mpl.colormaps["cividis"]
    return [mpl.colors.to_hex(cmap(0.9 * i / max(n - 1, 1))) for i in range(n)]


def mathtext(label: str) -> str:
    """A label of the schema for matplotlib: ``_x`` becomes a subscript."""
    return re.sub(r"_(\w)", r"$_{\1}$", label)
