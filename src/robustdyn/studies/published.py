"""Published training curves at full size, one run each: when and by how much networks overfit robustly.

The runs are those of the robust-overfitting study (Rice et al., ICML 2020) and of the AWP study (Wu et al.,
NeurIPS 2020), which ``robustdyn-import`` turns into run directories. A theme compares the runs that differ in
one setting. A run is found by its study and by the first folder of its name, because the logs do not hold all
that tells runs apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from robustdyn.errors import RecordError
from robustdyn.records.reader import Run, read_table
from robustdyn.records.schema import EPOCHS, ROBUST_ERROR_GAP, TEST_ROBUST_ERROR
from robustdyn.records.training_logs import AWP, ROBUST_OVERFITTING
from robustdyn.records.writer import summarise
from robustdyn.report import style
from robustdyn.report.plotting import finish, key
from robustdyn.report.statistics import decay_epochs
from robustdyn.studies.shared.comparing import BEST, FINAL, RATE, RISE, data_set
from robustdyn.studies.shared.comparison_figures import name_rows, setting_colours
from robustdyn.studies.shared.study import Answer, Picture, Study

PLAIN = "cifar10_standard"
"""CIFAR-10, l∞, PreActResNet-18, decays at epochs 100 and 150 of 200: what the other runs change."""
PROTOCOL_DECAY = 5e-4
"""Both studies' weight decay, on all parameters; no log holds it."""
UNLIKE = {
    "cifar10_cutout": ("2", "4", "6", "8", "10", "12"),
    "cifar10_l1": ("5e-4", "5e-5", "5e-6", "5e-7"),
    "cifar10_mixup": ("0.2", "0.4", "0.6", "0.8", "1.0"),
    "cifar10_lr": ("smartdrop",),
}
"""Runs of 17 to 22 January 2020, marked †. They overfit long before the decay, as without weight decay, so
that they can be compared with one another only: the script must have changed after them."""
UNLIKE_MARK = " †"
NEGLIGIBLE = 0.01  # of the highest rate: lower ones are logged with one or two digits, and seem to jump
WINDOW = 5  # epochs: figures show means over so many, because single ones scatter by half a point
SCHEDULES = {"superconverge": "one-cycle", "multipledecay": "multiple decays", "manystep": "many steps"}
NORMS = {"linf": "l∞", "l2": "l2"}
OF_BEST, SINCE, DECAY = "epoch of best", "epochs since the decay", "first decay"
LOSS, CURVE = "epoch of lowest loss", "test robust error"


@dataclass(frozen=True)
class _Curve:
    """An imported run: its record, and the first epoch that ran at a lower rate from its start (or None)."""

    run: Run
    epochs: pd.DataFrame
    decay: int | None

    @classmethod
    def of(cls, run: Run, epochs: pd.DataFrame) -> _Curve:
        """From its record.

        The rate of an epoch is that of its last step, for which both studies take the next epoch's rate. So
        an epoch ran wholly at a lower rate if the one before ended with it.
        """
        known = epochs[epochs[RATE] >= NEGLIGIBLE * epochs[RATE].max()]
        return cls(run, epochs, next((epoch + 1 for epoch in decay_epochs(known)), None))

    @property
    def study(self) -> str:
        """Where it comes from."""
        return str(self.run.config["source"]["study"])

    @property
    def folder(self) -> str:
        """The first folder of its name."""
        return str(self.run.config["name"]).partition("/")[0]

    @property
    def detail(self) -> str:
        """The last word of its name."""
        return str(self.run.config["name"]).rpartition("_")[2]

    def setting(self, name: str, absent: Any = 0.0) -> Any:
        """A setting, ``section.key``."""
        section, _, leaf = name.partition(".")
        return self.run.config.get(section, {}).get(leaf, absent)

    @property
    def threat(self) -> str:
        """``CIFAR-10, l∞``."""
        return f"{data_set(self.run)}, {NORMS.get(self.setting('attack.norm', ''), '')}"

    def cut(self, length: int) -> _Curve:
        """Its first epochs."""
        return _Curve(self.run, self.epochs[self.epochs["epoch"] < length], self.decay)


Level = tuple[float | str, str]
"""A place in the order of a theme, and the name of the setting."""


class Theme(NamedTuple):
    """Runs that differ in one setting.

    Attributes:
        title: What differs.
        folders: First folders of the names of its runs, besides the plain run.
        level: A run's setting.
        cut: Whether all runs end with the shortest one, because the others decay again later.
        studies: Whose runs.
        plain: Whether the plain run belongs to it.
    """

    title: str
    folders: tuple[str, ...]
    level: Callable[[_Curve], Level]
    cut: bool = False
    studies: tuple[str, ...] = (ROBUST_OVERFITTING,)
    plain: bool = True


def _timing(curve: _Curve) -> Level:
    return curve.decay or 0, f"decay at {curve.decay}"


def _rates(curve: _Curve) -> Level:
    rates = curve.epochs.set_index("epoch")[RATE]
    before, after = float(rates.iloc[0]), float(rates.loc[curve.decay or 0])
    return 1e3 * before + after, f"{before:g} → {after:g}"


def _schedule(curve: _Curve) -> Level:
    name, rate = str(curve.setting("schedule.name", "unknown")), float(curve.setting("optimizer.lr"))
    length = int(curve.setting("trainer.max_epochs"))
    more = [f"up to {rate:g}"] * (rate != 0.1) + [f"{length} epochs"] * (length != 200)
    shown = ", ".join([SCHEDULES.get(name, name), *more])
    return shown, shown


def _amount(name: str, text: str) -> Callable[[_Curve], Level]:
    def level(curve: _Curve) -> Level:
        amount = float(curve.setting(name))
        return amount, text.format(amount) if amount else "none"

    return level


def _cutout(curve: _Curve) -> Level:
    side = curve.setting("data.augment", {}).get("cutout", 0)
    return side, f"{side} px" if side else "none"


def _decay_of_weights(curve: _Curve) -> Level:
    amount = float(curve.setting("optimizer.weight_decay", PROTOCOL_DECAY))
    alone = curve.setting("regularizer.weight_decay_on", "all") == "weights"
    return amount + 1e-9 * alone, f"{amount:g}" if alone else f"{amount:g}, BatchNorm too"


def _width(curve: _Curve) -> Level:
    width = int(curve.setting("model.widen_factor"))
    return width, f"WideResNet-34-{width}" if width else "PreActResNet-18"


def _threat(curve: _Curve) -> Level:
    fast = "fgsm" in curve.folder
    step = f" of {curve.detail} ε" if fast and curve.detail.replace(".", "").isdigit() else ""
    return f"{curve.threat}{fast}{step}", f"{curve.threat}{f', one step{step}' if fast else ''}"


def _method(curve: _Curve) -> Level:
    wide = str(curve.setting("model.name", "")).startswith("Wide")
    threat = f"{curve.threat}{', WideResNet-34-10' if wide else ''}"
    awp = bool(curve.setting("perturbation.gamma"))
    return f"{threat}{awp}", f"{threat}: {'AWP' if awp else 'AT'}"


def _repeat(curve: _Curve) -> Level:
    folders = (PLAIN, "cifar10_l2", "cifar10_validation")
    names = ("standard", "decay on weights only", "49,000 images", "AWP study, PGD-20")
    place = folders.index(curve.folder) if curve.study == ROBUST_OVERFITTING else len(folders)
    return place, names[place]


THEMES = {
    "decay_timing": Theme("Epoch of the first decay", ("cifar10_dropepoch",), _timing, cut=True),
    "second_rate": Theme("Rate after the decay", ("cifar10_droplr",), _rates, cut=True),
    "initial_rate": Theme("Initial rate", ("cifar10_startlr",), _rates, cut=True),
    "schedules": Theme("Schedule", ("cifar10_lr",), _schedule),
    "cutout": Theme("Cutout", ("cifar10_cutout",), _cutout),
    "mixup": Theme("Mixup", ("cifar10_mixup",), _amount("data.mixup", "α = {:g}")),
    "l2": Theme("Weight decay (l2)", ("cifar10_l2",), _decay_of_weights),
    "l1": Theme("l1", ("cifar10_l1",), _amount("regularizer.l1", "{:g}")),
    "width": Theme("Width", ("cifar10_wide",), _width),
    "threat": Theme(
        "Data and threat",
        (
            *("cifar10_fgsm", "cifar10_fgsm_l2", "cifar10_standard_l2"),
            *("cifar100_standard", "cifar100_l2", "svhn_standard", "svhn_standard_l2"),
        ),
        _threat,
    ),
    "awp": Theme(
        "AT (dashed) and AWP",
        ("cifar10_linf", "cifar10_l2", "cifar100_linf", "cifar100_l2", "svhn_linf", "svhn_l2"),
        _method,
        studies=(AWP,),
        plain=False,
    ),
    "repeats": Theme(
        "Runs that hardly differ",
        ("cifar10_validation", "cifar10_l2", "cifar10_linf"),
        _repeat,
        studies=(ROBUST_OVERFITTING, AWP),
    ),
}
FIGURES = {
    "rates": ("decay_timing", "second_rate", "initial_rate", "schedules"),
    "regularisers": ("cutout", "mixup", "l2", "l1"),
    "networks_and_attacks": ("width", "threat", "awp", "repeats"),
}


def _is_repeat(curve: _Curve) -> bool:
    """Whether a run of the folders of ``repeats`` differs from the plain one in hardly anything."""
    own = [curve.setting(name) for name in ("model.name", "attack.norm", "perturbation.gamma")]
    decay = curve.setting("optimizer.weight_decay", PROTOCOL_DECAY)
    return [*own, decay] == ["PreActResNet18", "linf", 0.0, PROTOCOL_DECAY]


def members(curves: Sequence[_Curve], name: str) -> dict[str, _Curve]:
    """The runs of a theme by their settings, in order."""
    theme = THEMES[name]
    found = [
        curve
        for curve in curves
        if (theme.plain and (curve.study, curve.folder) == (ROBUST_OVERFITTING, PLAIN))
        or (curve.study in theme.studies and curve.folder in theme.folders)
    ]
    if name == "repeats":
        found = [curve for curve in found if _is_repeat(curve)]
    if theme.cut and found:
        length = min(int(curve.epochs["epoch"].max()) + 1 for curve in found)
        found = [curve.cut(length) for curve in found]
    levels = {curve.run.path: theme.level(curve) for curve in found}
    by_level: dict[str, _Curve] = {}
    for curve in sorted(found, key=lambda curve: levels[curve.run.path]):
        unlike = curve.study == ROBUST_OVERFITTING and curve.detail in UNLIKE.get(curve.folder, ())
        label = levels[curve.run.path][1] + UNLIKE_MARK * unlike
        if label in by_level:
            raise RecordError(
                f"{curve.run.path}: is {theme.title.lower()} “{label}” as {by_level[label].run.path} is; "
                "leave one out"
            )
        by_level[label] = curve
    return by_level


def outcomes(levels: Mapping[str, _Curve]) -> pd.DataFrame:
    """What each run of a theme comes to, errors and gap in per cent and percentage points.

    The best epoch is the one of lowest robust test error, picked on the test set, so that it flatters.
    """
    rows = []
    for setting, curve in levels.items():
        summary = summarise(curve.epochs)
        best, final, lowest = (summary[k] for k in ("best_on_test", "final", "min_test_robust_loss"))
        assert isinstance(best, dict) and isinstance(final, dict) and isinstance(lowest, dict)  # noqa: PT018
        scale = EPOCHS[TEST_ROBUST_ERROR].scale
        errors = scale * best[TEST_ROBUST_ERROR], scale * final[TEST_ROBUST_ERROR]
        rows.append(
            {
                "setting": setting,
                BEST: errors[0],
                FINAL: errors[1],
                RISE: errors[1] - errors[0],
                "final gap": scale * final[ROBUST_ERROR_GAP],
                "epochs": len(curve.epochs),
                OF_BEST: best["epoch"],
                DECAY: curve.decay,
                SINCE: None if curve.decay is None else best["epoch"] - curve.decay,
                LOSS: lowest["epoch"],
                "rise of the loss": summary["robust_loss_rise"],
                "run": f"{curve.study}/{curve.run.config['name']}",
            }
        )
    whole = dict.fromkeys((OF_BEST, DECAY, SINCE, LOSS), "Int64")
    return pd.DataFrame(rows).astype(whole)


def drawn(levels: Mapping[str, _Curve], table: pd.DataFrame, theme: str) -> pd.DataFrame:
    """What a figure draws of a theme: curves as means over ``WINDOW`` epochs, best, final, first decay."""
    parts = []
    for setting, curve in levels.items():
        rows = curve.epochs.assign(window=curve.epochs["epoch"] // WINDOW)
        means = rows.groupby("window")[["epoch", TEST_ROBUST_ERROR]].mean()
        scaled = EPOCHS[TEST_ROBUST_ERROR].scale * means[TEST_ROBUST_ERROR]
        parts.append(
            pd.DataFrame({"setting": setting, "quantity": CURVE, "epoch": means["epoch"], "value": scaled})
        )
    ends = table.melt(["setting", OF_BEST, "epochs"], [BEST, FINAL, DECAY], "quantity", "value")
    at = {BEST: ends[OF_BEST], FINAL: ends["epochs"] - 1, DECAY: ends["value"]}
    ends["epoch"] = np.select(
        [ends["quantity"] == name for name in at], [c.astype(float) for c in at.values()]
    )
    found = pd.concat([*parts, ends.dropna(subset=["value"])], ignore_index=True)
    found.insert(0, "theme", theme)
    return found.astype({"value": float})[["theme", "setting", "quantity", "epoch", "value"]].round(3)


def answer(runs: Sequence[Run]) -> Answer:
    """See ``STUDY``."""
    curves = []
    for run in runs:
        if "source" not in run.config:
            raise RecordError(f"{run.path}: is no imported run; robustdyn-import makes them, or leave it out")
        epochs = read_table(run.path, "epochs")
        if epochs[TEST_ROBUST_ERROR].notna().any():  # not of training without an attack
            curves.append(_Curve.of(run, epochs))
    themes = {name: members(curves, name) for name in THEMES}
    known = {name: levels for name, levels in themes.items() if len(levels) > 1}
    if not known:
        raise RecordError(
            f"{runs[0].path}: no two runs of the published studies differ in one setting; import "
            f"more of them, under the names that they have there ({PLAIN}/..., for example)"
        )
    tables = {name: outcomes(levels) for name, levels in known.items()}
    pictures = []
    for figure, names in FIGURES.items():
        parts = [drawn(known[name], tables[name], name) for name in names if name in known]
        if parts:
            pictures.append(Picture(figure, pd.concat(parts, ignore_index=True), partial(draw, figure)))
    return Answer(tables, pictures, findings_of(tables))


def findings_of(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """How many runs end above their best and by how much; what differences say something."""
    every = pd.concat(tables.values(), ignore_index=True).drop_duplicates("run", keep="last")
    every = every.drop_duplicates([BEST, FINAL, OF_BEST, "final gap"])  # one log is in both studies
    every = every[~every["setting"].str.endswith(UNLIKE_MARK)]
    since = every[SINCE].dropna()
    said = [
        f"Of {len(every)} runs {int((every[RISE] > 1).sum())} end more than one percentage point above their "
        f"best robust error (median rise {every[RISE].median():.1f} points), and the best epoch comes before "
        f"the first decay in {int((since < 0).sum())} of the {len(since)} with one."
    ]
    if "repeats" in tables:
        alike = tables["repeats"]
        alike = alike[alike["run"].str.startswith(ROBUST_OVERFITTING)]
        spread = {name: float(np.ptp(alike[name])) for name in (BEST, FINAL)}
        said.append(
            f"{len(alike)} runs that hardly differ have best errors {spread[BEST]:.1f} points apart and "
            f"final ones {spread[FINAL]:.1f}, so that smaller differences between single runs say nothing."
        )
    return said


def _problem(setting: str) -> str:
    return setting.removesuffix(": AT").removesuffix(": AWP")


@style.styled
def draw(name: str, table: pd.DataFrame) -> Figure:
    """A row for each theme: curves over epochs, and best (open) and final (filled) by setting."""
    themes = list(dict.fromkeys(table["theme"]))
    sizes = [1.0 + 0.2 * table[table["theme"] == theme]["setting"].nunique() for theme in themes]
    title = f"Published runs at full size, one each: {name.replace('_', ' ')}"
    figure = style.new_figure(title, 0.9 + sum(sizes))
    axes = figure.subplots(len(themes), 2, squeeze=False, height_ratios=sizes, width_ratios=(1.5, 1.0))
    for (left, right), theme in zip(axes, themes, strict=True):
        own = table[table["theme"] == theme]
        problems = own.assign(setting=[_problem(setting) for setting in own["setting"]])
        shared = setting_colours(problems)  # AT and AWP on one problem have one colour
        pairs = zip(own["setting"], problems["setting"], strict=True)
        colours = {setting: shared[problem] for setting, problem in pairs}
        order = list(colours)
        marker_of = dict(zip(shared, style.markers(len(shared)), strict=True))
        for i, (setting, colour) in enumerate(colours.items()):
            marker = marker_of[_problem(setting)]
            rows = own[own["setting"] == setting]
            curve = rows[rows["quantity"] == CURVE]
            line = "--" if setting.endswith(": AT") else "-"
            left.plot(
                curve["epoch"], curve["value"], color=colour, linewidth=1.3, linestyle=line, marker=marker,
                markevery=style.sparse(len(curve), i),
            )  # fmt: skip
            for _, point in rows[rows["quantity"].isin((BEST, FINAL))].iterrows():
                fill = colour if point["quantity"] == FINAL else "white"
                y = len(order) - 1 - order.index(setting)
                right.plot(
                    point["value"], y, marker or "o", color=colour, markerfacecolor=fill, markersize=5.5
                )
        decays = own[own["quantity"] == DECAY].drop_duplicates("value")
        for _, point in decays.iterrows():
            shade = style.MARK if len(decays) == 1 else colours[point["setting"]]
            left.axvline(point["value"], color=shade, linewidth=0.9, linestyle=":")
        finish(left, THEMES[theme].title, "%")
        name_rows(right, order)
        right.set_xlabel("robust test error (%)")
    figure.legend(
        handles=[
            key(f"robust test error, means of {WINDOW} epochs; colour and mark as on the right"),
            key("first decay", ":"),
            key("best epoch, picked on the test set", "", "o", markerfacecolor="white", markersize=5.5),
            key("last epoch", "", "o", markersize=5.5),
        ],
        loc="outside lower center",
        ncols=2,
    )
    return figure


STUDY = Study(
    "When and by how much do networks of the papers' size overfit robustly, in published runs, one of each?",
    answer,
)
