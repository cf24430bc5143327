"""Comparing runs over seeds: which may be put together, what they come to, and how well it is known.

Tables are tidy: ``setting`` (the level of what is compared), ``quantity`` (a column of the ``epochs`` or
``wci`` records), ``seed``, and ``epoch`` where it is a curve. Where data sets are drawn apart, ``panel``
names them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np
import pandas as pd
from scipy import stats

from robustdyn.errors import RecordError
from robustdyn.records.columns import Column
from robustdyn.records.labels import SEED, differences, format_value
from robustdyn.records.reader import Run, combine, read_table
from robustdyn.records.schema import (
    CATONI,
    EPOCHS,
    HESSIAN_EIGENVALUE,
    ROBUST_ERROR_GAP,
    ROBUST_LOSS_GAP,
    SPECTRUM,
    TEST_CLEAN_ERROR,
    TEST_ROBUST_ERROR,
    TEST_ROBUST_LOSS,
    WCI,
)
from robustdyn.report.statistics import by_run, decay_epochs

OPERATION = ("checkpoint", "nonfinite", "resume")  # sections that change no result
LEVEL = 0.95
BOUNDS = ("mean", "low", "high")

INDEX, RATE = "wci", "lr"
COLUMNS: dict[str, Column] = {
    column.name: column
    for column in (SPECTRUM[HESSIAN_EIGENVALUE], *CATONI.columns, *WCI.columns, *EPOCHS.columns)
}
DATA_SETS = {"CIFAR10": "CIFAR-10", "CIFAR100": "CIFAR-100", "SVHN": "SVHN", "Digits": "digits"}
BEST, FINAL, RISE = "best", "final", "final − best"
MOMENTS = (BEST, FINAL, RISE)
METRICS = (TEST_ROBUST_ERROR, TEST_CLEAN_ERROR, ROBUST_ERROR_GAP, TEST_ROBUST_LOSS, ROBUST_LOSS_GAP)
"""What is compared at the moments of a run."""
MOMENT = ["setting", "metric", "unit", "moment"]


# ---------------------------------------------------------------------- runs that may be put together


def require_alike(runs: Sequence[Run], but: Collection[str] = (), of: str = "") -> None:
    """Refuse runs that differ in more than their seed and the settings ``but``.

    All that differs counts, also what one setting implies: a schedule that comes with another model is two
    differences.

    Args:
        runs: Runs to put together.
        but: Dotted keys, or sections of the configuration with all that is in them.
        of: What the runs are of, for the message.

    Raises:
        RecordError: They do; the message names the settings and their values.
    """
    free = (SEED, *but)
    other = [
        f"{key} ({', '.join(dict.fromkeys(map(format_value, values)))})"
        for key, values in differences(runs).items()
        if not any(f"{key}.".startswith(f"{name}.") for name in (*free, *OPERATION))
    ]
    if other:
        raise RecordError(
            f"runs{of and f' of {of}'} differ in more than their {', '.join(free)}: {', '.join(other)}; give "
            "those of one sweep, or some of them, as several paths or by a shell pattern"
        )


def require_repetitions(runs: Sequence[Run], setting: Callable[[Run], str] = lambda run: "") -> None:
    """Refuse runs of one setting that differ in more than their seed, or do not differ in it.

    Their mean would say nothing, or count one run twice.

    Args:
        runs: Runs to put together.
        setting: A run's level of what is compared.

    Raises:
        RecordError: There are such runs; the message names the settings that differ, or both runs.
    """
    members: dict[str, list[Run]] = {}
    for run in runs:
        members.setdefault(setting(run), []).append(run)
    for name, own in members.items():
        require_alike(own, of=name)
        by_seed: dict[object, Run] = {}
        for run in own:
            seed = run.config.get(SEED)
            if seed in by_seed:
                of = name and f" of {name}"
                raise RecordError(
                    f"{run.path}: seed {seed}{of} is that of {by_seed[seed].path} too; leave one out"
                )
            by_seed[seed] = run


def require_complete(runs: Sequence[Run]) -> None:
    """Refuse runs that are not at their last epoch, or were not evaluated there.

    Raises:
        RecordError: Some run is not; the message names it.
    """
    recorded = by_run(combine(runs, "epochs").dropna(subset=[TEST_ROBUST_ERROR]))
    for run in runs:
        wanted = int(run.config["trainer"]["max_epochs"])
        evaluated = recorded[run.label]["epoch"]
        reached = 0 if evaluated.empty else int(evaluated.max()) + 1
        if reached < wanted:
            raise RecordError(
                f"{run.path}: evaluated up to epoch {reached} of {wanted}; finish it with the same "
                "training command, or leave it out"
            )


# ---------------------------------------------------------------------- their records


def data_set(run: Run) -> str:
    """The data set's name."""
    name = str(run.config["data"]["_target_"]).rpartition(".")[2]
    return DATA_SETS.get(name, name)


def values(
    runs: Sequence[Run],
    quantities: Sequence[str],
    setting: Callable[[Run], str],
    panel: Callable[[Run], str] | None = data_set,
    optional: Sequence[str] = (),
) -> pd.DataFrame:
    """Recorded values of all runs, one row each, in the runs' order.

    Args:
        runs: Runs to compare.
        quantities: Columns of the ``epochs``, ``wci`` or ``catoni`` records that every run must have, or the
            largest ``hessian_eigenvalue``.
        setting: A run's level of what is compared.
        panel: What is drawn apart; ``None`` for one panel, and no such column.
        optional: Further columns, taken where recorded.

    Returns:
        ``panel``, ``setting``, ``seed``, ``epoch``, ``quantity``, ``value``; the learning rate always.

    Raises:
        RecordError: A quantity was not recorded, runs of one setting differ in more than their seed or have
            the same, or a run is shorter than the others of its panel.
    """
    heads = [({"panel": panel(run)} if panel else {}) | {"setting": setting(run)} for run in runs]
    named = {
        run.path: f"{head['setting'] or 'one setting'} on {head['panel']}" if panel else head["setting"]
        for run, head in zip(runs, heads, strict=True)
    }
    require_repetitions(runs, lambda run: named[run.path])
    frames: list[pd.DataFrame] = []
    ends = [_last_epoch(run) for run in runs]
    for run, head, last in zip(runs, heads, ends, strict=True):
        full = max(
            end for other, end in zip(heads, ends, strict=True) if other.get("panel") == head.get("panel")
        )
        if last < full:
            raise RecordError(
                f"{run.path}: ends after epoch {last}, others after {full}; finish it or leave it out"
            )
        for name in dict.fromkeys([RATE, *quantities, *optional]):
            known = read_table(run.path, _table_of(name)).dropna(subset=[name])
            known = known[known["index"] == 0] if name == HESSIAN_EIGENVALUE else known
            if known.empty and name in quantities:
                raise RecordError(f"{run.path}: {_lacks(name)}")
            rows = pd.DataFrame({"epoch": known["epoch"], "quantity": name, "value": known[name]})
            named_rows = rows.assign(**head, **{SEED: run.config[SEED]})
            frames.append(named_rows[[*head, SEED, "epoch", "quantity", "value"]])
    return pd.concat([frame for frame in frames if len(frame)], ignore_index=True)


def in_shown_units(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of ``values`` in the units people read: errors in per cent."""
    return rows.assign(value=rows["value"] * rows["quantity"].map(lambda name: COLUMNS[name].scale))


def keys_of(rows: pd.DataFrame) -> list[str]:
    """The columns that tell settings apart: ``panel``, where there is one, and ``setting``."""
    return [name for name in ("panel", "setting") if name in rows]


def decay_epoch(rows: pd.DataFrame) -> int | None:
    """First epoch at a lower rate, from rows of one run or of one setting's curves; None without any."""
    rate = rows[rows["quantity"] == RATE].rename(columns={"value": RATE, "mean": RATE})
    return next(iter(decay_epochs(rate)), None)


# ---------------------------------------------------------------------- what they come to


def best_and_final(rows: pd.DataFrame, picked_by: str | None = None) -> pd.DataFrame:
    """Each quantity of ``values`` at its best epoch and at its last, and final − best, in every run.

    The best epoch is selected on the test set, as in the papers, so that it flatters: final − best of the
    selecting quantity is at least 0.

    Args:
        rows: As ``values`` returns them.
        picked_by: The quantity whose lowest value picks one best epoch for all; ``None`` for each one's own.

    Returns:
        A row per run and quantity: the keys, ``seed``, ``quantity``, ``best``, ``final``, ``final − best``.
    """
    found = []
    heads = [*keys_of(rows), SEED]
    for head, own in rows.groupby(heads, sort=False):
        wide = own.pivot(index="epoch", columns="quantity", values="value")
        for quantity in dict.fromkeys(own["quantity"]):
            curve = wide[quantity].dropna()
            picked = curve.min() if picked_by is None else wide[quantity][wide[picked_by].idxmin()]
            final = curve.iloc[-1]
            found.append((*head, quantity, picked, final, final - picked))
    return pd.DataFrame(found, columns=[*heads, "quantity", BEST, FINAL, RISE])


def at_moments(rows: pd.DataFrame) -> pd.DataFrame:
    """``METRICS`` at ``MOMENTS`` of every run, best at the epoch of its lowest robust error, in shown units.

    Args:
        rows: As ``values`` returns them, without panels.

    Returns:
        ``setting``, ``seed``, ``metric``, ``unit``, ``moment``, ``value``; settings in their order.
    """
    return tidy_moments(
        best_and_final(in_shown_units(rows[rows["quantity"].isin(METRICS)]), TEST_ROBUST_ERROR)
    )


def tidy_moments(found: pd.DataFrame) -> pd.DataFrame:
    """As ``at_moments``, from a row per setting, seed and quantity with the moments as columns."""
    tidy = found.rename(columns={"quantity": "metric"}).melt(["setting", SEED, "metric"], var_name="moment")
    tidy.insert(3, "unit", tidy["metric"].map(lambda name: COLUMNS[name].shown_unit))
    return _ordered(tidy)


def paired(rows: pd.DataFrame, reference: pd.DataFrame, on: Sequence[str]) -> pd.DataFrame:
    """``rows`` beside the row of ``reference`` of the same ``on``, whose value is in ``reference``.

    Runs of one seed share initial weights and the order of the data, so that pairs differ less than runs.
    Rows without a partner are left out.
    """
    partner = reference[[*on, "value"]].rename(columns={"value": "reference"})
    return rows.merge(partner, on=list(on), validate="many_to_one")


def against(found: pd.DataFrame, reference: str, by: Sequence[str]) -> pd.DataFrame:
    """Every other setting minus ``reference``, seed by seed: mean and 95 % interval of the differences.

    Args:
        found: ``setting``, ``seed``, ``value`` and ``by``.
        reference: The setting that the others are compared with; where it is missing, no rows.
        by: Columns to compare by, besides setting and seed.

    Returns:
        As ``mean_with_interval``. The intervals are not adjusted for their number.
    """
    own = found["setting"] == reference
    pairs = paired(found[~own], found[own], [*by, SEED])
    pairs["value"] -= pairs.pop("reference")
    return mean_with_interval(pairs, [name for name in found if name in (*by, "setting")])


def pearson(x: pd.Series, y: pd.Series) -> dict[str, float]:
    """Pearson's ``r`` with Fisher's 95 % interval (``low``, ``high``) and ``p``, of independent pairs."""
    found = stats.pearsonr(x, y)
    low, high = found.confidence_interval(LEVEL)
    return {"r": found.statistic, "low": low, "high": high, "p": found.pvalue}


def correlations(rows: pd.DataFrame, index: str = INDEX) -> pd.DataFrame:
    """Correlation of an index, such as the WCI, and robust gaps over the measured epochs of each run.

    Between evaluated epochs a gap is interpolated linearly. No p-values: epochs of a run are not independent
    of one another.

    Returns:
        ``panel``, ``setting``, ``seed``, ``quantity`` (the gap), ``phase``, ``epochs`` (their number),
        ``pearson``, ``spearman``; nothing for fewer than three epochs.
    """
    found = []
    for (panel, setting, seed), own in rows.groupby(["panel", "setting", SEED], sort=False):
        wide = own.pivot(index="epoch", columns="quantity", values="value")
        wide = wide.reindex(columns=[ROBUST_LOSS_GAP, ROBUST_ERROR_GAP, index])
        wide[[ROBUST_LOSS_GAP, ROBUST_ERROR_GAP]] = wide[[ROBUST_LOSS_GAP, ROBUST_ERROR_GAP]].interpolate(
            "index", limit_area="inside"
        )
        decay = decay_epoch(own)
        phases = {"all epochs": wide}
        if decay is not None:
            phases["after the first decay"] = wide[wide.index >= decay]
        for gap in (ROBUST_LOSS_GAP, ROBUST_ERROR_GAP):
            for phase, part in phases.items():
                pairs = part[[index, gap]].dropna()
                if len(pairs) > 2 and (pairs.nunique() > 1).all():
                    r = stats.pearsonr(pairs[index], pairs[gap]).statistic
                    rank = stats.spearmanr(pairs[index], pairs[gap]).statistic
                    found.append((panel, setting, seed, gap, phase, len(pairs), r, rank))
    names = ["panel", "setting", SEED, "quantity", "phase", "epochs", "pearson", "spearman"]
    return pd.DataFrame(found, columns=names)


# ---------------------------------------------------------------------- means over seeds


def mean_with_interval(
    frame: pd.DataFrame, by: Sequence[str], column: str = "value", *, geometric: bool = False
) -> pd.DataFrame:
    """Mean over the rows that share ``by``, and Student's 95 % interval of it.

    Seeds are taken for independent draws of one normal law; of a skewed or two-peaked one the interval covers
    0.7 to 0.9. With a single seed there is no interval.

    Args:
        frame: One row for each seed and combination of ``by``; rows without a value are left out.
        by: Columns that tell apart what is averaged separately, such as group and epoch.
        column: What to average.
        geometric: Average logarithms, of positive numbers that change by factors. The interval stays
            positive; rows that are not positive are left out.

    Returns:
        Columns ``by``, ``mean``, ``low``, ``high`` (missing with one seed) and ``seeds``, ordered by ``by``.
    """
    if geometric:
        logs = np.log(frame[column].where(frame[column] > 0))
        found = mean_with_interval(frame.assign(**{column: logs}), by, column)
        found[list(BOUNDS)] = np.exp(found[list(BOUNDS)])
        return found
    known = frame.dropna(subset=[column])
    found = (
        known.groupby(list(by), sort=False, observed=True)[column].agg(["mean", "sem", "count"]).reset_index()
    )
    half = found["sem"] * stats.t.ppf((1 + LEVEL) / 2, (found["count"] - 1).clip(lower=1))
    half = half.where(found["count"] > 1)
    return found[list(by)].assign(
        mean=found["mean"], low=found["mean"] - half, high=found["mean"] + half, seeds=found["count"]
    )


def mean_curves(rows: pd.DataFrame, *, geometric: bool = False) -> pd.DataFrame:
    """Mean and 95 % interval over seeds of ``values``, for each epoch.

    Epochs that some seeds lack (measured around decays, say) have fewer ``seeds``.
    """
    return mean_with_interval(rows, [*keys_of(rows), "quantity", "epoch"], geometric=geometric)


def metrics_over_epochs(rows: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    """``mean_curves`` of some quantities, as ``metric``, in shown units and in order."""
    own = in_shown_units(rows[rows["quantity"].isin(metrics)])
    return _ordered(mean_curves(own).rename(columns={"quantity": "metric"}))


def _ordered(frame: pd.DataFrame) -> pd.DataFrame:
    """Settings as they come, metrics and moments in their order, then by seed or epoch."""
    ranks = {
        "setting": {name: i for i, name in enumerate(dict.fromkeys(frame["setting"]))},
        "metric": {name: i for i, name in enumerate((*METRICS, *EPOCHS.names, *WCI.names))},
        "moment": {name: i for i, name in enumerate(MOMENTS)},
    }
    by = [name for name in ("setting", "metric", "moment", SEED, "epoch") if name in frame]
    return frame.sort_values(
        by, key=lambda column: column.map(ranks[column.name]) if column.name in ranks else column
    ).reset_index(drop=True)


def _table_of(quantity: str) -> str:
    if quantity in EPOCHS.names:
        return EPOCHS.name
    if quantity in CATONI.names:
        return CATONI.name
    return SPECTRUM.name if quantity == HESSIAN_EIGENVALUE else WCI.name


def _last_epoch(run: Run) -> int:
    """The last finished epoch.

    Raises:
        RecordError: There is none.
    """
    epochs = read_table(run.path, "epochs")["epoch"]
    if epochs.empty:
        raise RecordError(f"{run.path}: no finished epoch; finish the run or leave it out")
    return int(epochs.max())


def _lacks(quantity: str) -> str:
    """What to do about a quantity that was not recorded."""
    if quantity in EPOCHS.names:
        return (
            f"no epoch has a {quantity}; train until the first evaluation (trainer.check_val_every_n_epoch)"
        )
    if quantity in CATONI.names:
        return "needs a measured bound; train with measure=bound or full"
    return "needs measured WCI; train with measure=index or default"
