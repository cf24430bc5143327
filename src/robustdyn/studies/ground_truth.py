"""Is the theory right? The distribution of replicas' weights against what curvature and noise predict.

Xu and Zhang, How Learning Dynamics Drive Adversarially Robust Generalization?, arXiv 2410.07719, predict
posterior variances and do not measure them. Replicas of one checkpoint do: ``robustdyn-replicas``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from robustdyn.errors import RecordError
from robustdyn.records.reader import Run
from robustdyn.records.schema import TOTAL_CORRELATION
from robustdyn.replicas.agreement import Agreement, agreement
from robustdyn.replicas.ensemble_record import RecordedEnsemble, read_ensemble
from robustdyn.replicas.families import between, jackknifed, within
from robustdyn.replicas.memory import memory
from robustdyn.replicas.own_gradients import own_gradients
from robustdyn.replicas.prediction import (
    DRIFT,
    EXACT,
    INJECTED,
    MIXTURE,
    NOISE_FREE,
    REFRESHED,
    SETTLED,
    Law,
    example_noise,
    predicted_laws,
    refreshed_with_error,
    sampling_of,
)
from robustdyn.studies.shared.ensemble_figures import (
    DRAWN,
    GOAL,
    NAMES,
    draw_drift,
    draw_gaussianity,
    draw_mean,
    draw_memory,
    draw_ratio,
    draw_ratio_by_eigenvalue,
    draw_variances,
)
from robustdyn.studies.shared.expansion_figures import BREAKS, draw_expansion, expansion_tables
from robustdyn.studies.shared.normality import LEVEL, normality, normality_of_directions
from robustdyn.studies.shared.study import Answer, Picture, Study
from robustdyn.theory.transient import DECAY

CONFIDENCE, RESAMPLES, DRAWS = 0.95, 1000, 40
MANY = 4  # changes of the rate from which on a schedule counts as smooth
SHOWN = 6  # directions in the figure of variances
POSTERIOR_OF = {INJECTED: "one run", MIXTURE: "runs"}  # after a decay
MISFITS = (
    "correlation_misfit",
    "commuting_misfit",
    TOTAL_CORRELATION,
    "total_correlation_expected",
    "total_correlation_spread",
    "total_correlation_commuting",
)
REMEMBERED = ["ensemble", "reference", "step", "learning_rate", "correlation", "error", "expected"]
OF_DIRECTION = ["ensemble", "step", "direction", "skewness", "skewness_p", "kurtosis", "kurtosis_p"]
OF_FAMILIES = [
    *("ensemble", "step", "learning_rate", "parents", "children", "steps_after", "direction"),
    *("between", "between_error", "within", "within_error"),
]
SEEN = ["ensemble", "step", "learning_rate", "slope", "slope_error", "noise", "noise_error"]

# by what ensembles of one kind are told apart, where they differ
TOLD_APART: tuple[tuple[str, Callable[[RecordedEnsemble], float]], ...] = (
    ("first rate", lambda e: float(e.learning_rate[0])),
    ("steps", lambda e: len(e.learning_rate)),
)


def label_of(settings: Mapping[str, Any]) -> str:
    """``CIFAR10, AWP``: data, method, and what is unusual about an ensemble."""
    objective = str(settings["objective"]["_target_"]).rpartition(".")[2]
    perturbation = settings.get("perturbation")
    method = (
        str(perturbation["_target_"]).rpartition(".")[2]
        if perturbation
        else {"AdversarialCrossEntropy": "AT", "CrossEntropy": "standard"}.get(objective, objective)
    )
    parts = [str(settings["data"]).rpartition(".")[2], method]
    if "betas" in settings["optimizer"]:
        parts.append("Adam, D held" if settings.get("freeze_preconditioner") else "Adam")
    if not settings["sampling.replacement"]:
        parts.append("shuffled epochs")
    if settings.get("batchnorm") == "train":
        parts.append("BatchNorm in train mode")
    changes = np.diff(settings["learning_rate"])
    if (changes > 0).any():
        parts.append("rate rises and falls")
    elif np.count_nonzero(changes) > MANY:
        parts.append("rate falls smoothly")
    return ", ".join(parts)


def find_ensembles(runs: Sequence[Run]) -> dict[str, RecordedEnsemble]:
    """The runs' ensembles by label, in the runs' order.

    Raises:
        RecordError: There is none, or one cannot be read.
    """
    read = [
        (run, settings.parent.name, read_ensemble(settings.parent))
        for run in runs
        for settings in sorted((run.path / "replicas").glob("*/settings.json"))
    ]
    found: dict[str, RecordedEnsemble] = {}
    for run, folder, ensemble in read:
        name = base = label_of(ensemble.settings)
        alike = [other for _, _, other in read if label_of(other.settings) == base]
        for text, value in TOLD_APART:
            if len({value(other) for other in alike}) > 1:
                name += f", {text} {value(ensemble):g}"
        found[f"{name} ({run.label} {folder})" if name in found else name] = ensemble
    if not found:
        raise RecordError(
            f"{', '.join(str(run.path) for run in runs)}: no ensemble of replicas; make one with "
            "robustdyn-replicas checkpoint=RUN/checkpoints/last.ckpt, or train with ensemble=default"
        )
    return found


def answer(runs: Sequence[Run]) -> Answer:
    """Compare every ensemble of the runs with every law."""
    ensembles = find_ensembles(runs)
    laws = {name: predicted_laws(e) for name, e in ensembles.items()}
    agreements = {
        name: {
            law: agreement(e.position, predicted, confidence=CONFIDENCE, resamples=RESAMPLES, seed=0)
            for law, predicted in laws[name].items()
        }
        for name, e in ensembles.items()
    }

    def each(rows: Callable[..., pd.DataFrame], *more: Mapping[str, Any]) -> pd.DataFrame:
        parts = [rows(name, e, *(one[name] for one in more)) for name, e in ensembles.items()]
        return pd.concat(parts, ignore_index=True)

    steps, directions = each(_steps, agreements, laws), each(_directions, agreements)
    path, replicas, remembered = each(_path), each(_seen_at_replicas), each(_memory)
    gaussian, mixture = each(_gaussianity), each(_mixture)
    described = pd.DataFrame([_described(name, e) for name, e in ensembles.items()])
    pictures = [
        Picture("ratio", steps[steps["step"] >= 1].reset_index(drop=True), draw_ratio),
        Picture("ratio_by_eigenvalue", _ends(directions, described), draw_ratio_by_eigenvalue),
        Picture("mean", steps[steps["step"] >= 1].reset_index(drop=True), draw_mean),
    ]
    for name in ensembles:
        rows = _shown(directions[directions["ensemble"] == name])
        pictures.append(Picture(f"variance_{_slug(name)}", rows, partial(draw_variances, name=name)))
    if not (path.empty and replicas.empty):
        both = pd.concat([path.assign(source="path"), replicas.assign(source="replicas")], ignore_index=True)
        pictures.append(Picture("drift", both, draw_drift))
    if not remembered.empty:
        pictures.append(Picture("memory", remembered, draw_memory))
    if gaussian["kurtosis"].notna().any():
        pictures.append(Picture("gaussianity", gaussian, draw_gaussianity))
    expanded = {name: e for name, e in ensembles.items() if e.lines is not None}
    tables = {
        "within_goal": within_goal(steps),
        "ensembles": described,
        "agreement": steps,
        "along_the_path": path,
        "at_the_replicas": replicas,
        "memory": remembered,
        "gaussianity": gaussian,
        "gaussianity_of_directions": each(_gaussianity_of_directions),
    }
    if not mixture.empty:
        tables["between_and_within"] = mixture
    if expanded:
        tables |= expansion_tables(expanded)
        pictures.append(Picture("expansion", tables["expansion_means"], draw_expansion))
    return Answer(tables, pictures, findings_of(tables))


# ---------------------------------------------------------------------- tables


def _described(name: str, ensemble: RecordedEnsemble) -> dict[str, object]:
    start, rates = ensemble.start, ensemble.learning_rate
    known = np.isfinite(start.slopes).all()
    led = np.isfinite(start.residuals)  # random directions have no residual
    slopes = start.slopes
    changes = np.flatnonzero(np.diff(rates) < -DECAY * rates[:-1]) + 1
    return {
        "ensemble": name,
        "replicas": len(ensemble.replicas),
        "steps": len(rates),
        "directions": start.directions.count,
        "learning_rate": rates[0],
        "decay_step": int(changes[0]) if len(changes) == 1 else None,
        "last_learning_rate": rates[-1],
        "robust_loss": start.loss,
        "largest_eigenvalue": start.eigenvalues[led].max(),
        "smallest_eigenvalue": start.eigenvalues[led].min(),
        "slope_over_eigenvalue": np.mean((np.diag(slopes) / start.eigenvalues)[led]) if known else np.nan,
        # 0 for the gradient of a function
        "slope_asymmetry": np.linalg.norm(slopes - slopes.T) / (2 * np.linalg.norm(slopes)),
    }


def _steps(
    name: str, ensemble: RecordedEnsemble, found: Mapping[str, Agreement], laws: Mapping[str, Law]
) -> pd.DataFrame:
    """One row per law and recorded step."""
    rows = []
    errors = {law: known.log_variance_error for law, known in laws.items()}
    if REFRESHED in found:
        variances = refreshed_with_error(ensemble, draws=DRAWS, seed=0)
        with np.errstate(divide="ignore"):
            logs = np.log(variances)
        moved = ensemble.steps > 0
        errors[REFRESHED] = own = np.zeros(len(ensemble.steps))
        own[moved] = logs[:, moved].mean(axis=2).std(axis=0, ddof=1)
    rates = _rates_before(ensemble, ensemble.steps)
    for law, seen in found.items():
        columns: dict[str, Any] = {
            "ensemble": name,
            "law": law,
            "posterior_of": POSTERIOR_OF.get(law),
            "step": ensemble.steps,
            "learning_rate": rates,
        }
        mean_error = laws[law].mean_error
        columns |= {
            "directions": seen.directions,
            "geometric_mean": seen.geometric_mean,
            "low": seen.geometric_low,
            "high": seen.geometric_high,
            "prediction_error": np.nan if errors[law] is None else errors[law],
            "rms_offset": _rms(seen.offset),
            "rms_mean_error": np.nan if mean_error is None else _rms(mean_error / np.sqrt(seen.predicted)),
            "rms_move": np.where(np.isfinite(seen.offset).any(axis=1), _rms(seen.move), np.nan),
            "rms_offset_of_chance": seen.offset_error,
        }
        rows.append(pd.DataFrame(columns | {column: getattr(seen, column) for column in MISFITS}))
    return pd.concat(rows, ignore_index=True)


def _rates_before(ensemble: RecordedEnsemble, steps: np.ndarray) -> np.ndarray:
    """The rate of the step that led to each of ``steps``; the first one at the start."""
    rates: np.ndarray = ensemble.learning_rate[np.maximum(steps - 1, 0)]
    return rates


def _rms(values: np.ndarray) -> np.ndarray:
    """Over the last axis, where anything is known."""
    known = np.isfinite(values).any(axis=-1)
    rms: np.ndarray = np.full(values.shape[:-1], np.nan)
    rms[known] = np.sqrt(np.nanmean(values[known] ** 2, axis=-1))
    return rms


def _directions(name: str, ensemble: RecordedEnsemble, found: Mapping[str, Agreement]) -> pd.DataFrame:
    """One row per law, recorded step and direction."""
    start, k = ensemble.start, ensemble.start.directions.count
    moved = np.flatnonzero(ensemble.steps > 0)
    steps = np.repeat(ensemble.steps[moved], k)
    head = {"step": steps, "learning_rate": _rates_before(ensemble, steps)}
    of_direction = {
        "direction": np.arange(1, k + 1),
        "eigenvalue": start.eigenvalues,
        "slope": np.diag(start.slopes),
    }
    head |= {column: np.tile(values, len(moved)) for column, values in of_direction.items()}
    parts = []
    for law, seen in found.items():
        columns = {"measured": seen.variance, "low": seen.low, "high": seen.high}
        columns |= {"predicted": seen.predicted, "offset": seen.offset}
        own = {column: values[moved].ravel() for column, values in columns.items()}
        parts.append(pd.DataFrame({"ensemble": name, "law": law} | head | own))
    return pd.concat(parts, ignore_index=True)


def _path(name: str, ensemble: RecordedEnsemble) -> pd.DataFrame:
    """Curvature and noise along the mean's path, relative to the start; geometric means over directions."""
    start = ensemble.start
    rows = []
    for step, point in zip([0, *ensemble.path_steps], [start, *ensemble.path], strict=True):
        gamma, first = (np.diag(sum(example_noise(ensemble, p))) for p in (point, start))
        curved = np.diag(point.hessian) / np.diag(start.hessian)
        steep = np.diag(point.slopes) / np.diag(start.slopes)
        rows.append(
            {
                "ensemble": name,
                "step": int(step),
                "learning_rate": float(ensemble.learning_rate[max(step - 1, 0)]),
                "robust_loss": point.loss,
                "curvature": _geometric(curved),
                "slope": _geometric(steep),
                "noise": _geometric(gamma / first),
            }
        )
    return pd.DataFrame(rows).drop_duplicates("step")


def _geometric(values: np.ndarray) -> float:
    good = values[np.isfinite(values) & (values > 0)]
    return float(np.exp(np.log(good).mean())) if len(good) == len(values) else float("nan")


def _seen_at_replicas(name: str, ensemble: RecordedEnsemble) -> pd.DataFrame:
    """One row per step at which replicas' own gradients show slope and noise, relative to the start."""
    own = own_gradients(ensemble)
    return own.assign(ensemble=name, learning_rate=_rates_before(ensemble, own["step"].to_numpy(dtype=int)))[
        SEEN
    ]


def _memory(name: str, ensemble: RecordedEnsemble) -> pd.DataFrame:
    """One row per recorded step before the decay or the end: what replicas remember of it there."""
    sampled = sampling_of(ensemble).replacement
    if not (sampled and np.isfinite(ensemble.start.slopes).all()):
        return pd.DataFrame(columns=REMEMBERED)
    references = _before_and_after(name, ensemble)
    found = pd.concat([memory(ensemble, reference) for reference in references], ignore_index=True)
    return found.assign(ensemble=name, learning_rate=_rates_before(ensemble, found["step"].to_numpy()))[
        REMEMBERED
    ]


def _before_and_after(name: str, ensemble: RecordedEnsemble) -> list[int]:
    """The recorded step at which the rate falls, if it does so once, and the last one."""
    steps = ensemble.steps.tolist()
    decay = _described(name, ensemble)["decay_step"]
    return [s for s in (decay, steps[-1]) if isinstance(s, int) and s in steps]


def _gaussianity(name: str, ensemble: RecordedEnsemble) -> pd.DataFrame:
    """One row per recorded step after the start: Mardia's tests of the replicas' places."""
    moved = np.flatnonzero(ensemble.steps > 0)
    found = normality(ensemble.position[:, moved])
    steps = ensemble.steps[moved]
    head = {"ensemble": name, "step": steps, "learning_rate": _rates_before(ensemble, steps)}
    return pd.concat([pd.DataFrame(head), found], axis=1)


def _gaussianity_of_directions(name: str, ensemble: RecordedEnsemble) -> pd.DataFrame:
    """One row per direction at the decay and at the end: skewness and kurtosis of the replicas' places."""
    steps = ensemble.steps.tolist()
    parts = [
        normality_of_directions(ensemble.position[:, steps.index(step)]).assign(step=step)
        for step in _before_and_after(name, ensemble)
    ]
    return pd.concat(parts, ignore_index=True).assign(ensemble=name)[OF_DIRECTION]


def _mixture(name: str, ensemble: RecordedEnsemble) -> pd.DataFrame:
    """One row per direction and step of recorded children: their variance between and within parents."""
    rows = []
    for families in ensemble.families:
        places = {"whole": families.places}
        apart = jackknifed(lambda x: between(x["whole"], x["whole"], same=True), places)
        noise = jackknifed(lambda x: within(x["whole"]), places)
        parents, children, _, k = families.places.shape
        head = (name, families.step, families.learning_rate, parents, children)
        for row, after in enumerate(families.steps.tolist()):
            values = np.stack([part[row] for part in (*apart, *noise)], axis=1)
            rows += [(*head, after, i + 1, *values[i]) for i in range(k)]
    return pd.DataFrame(rows, columns=OF_FAMILIES)


def _shown(directions: pd.DataFrame) -> pd.DataFrame:
    """The rows of a few directions, spread evenly over the logarithm of their rank."""
    last = int(directions["direction"].max())
    chosen = np.unique(np.rint(np.geomspace(1, last, min(SHOWN, last))).astype(int))
    laws = directions["law"].isin(DRAWN)
    rows: pd.DataFrame = directions[laws & directions["direction"].isin(chosen)]
    return rows.reset_index(drop=True)


def _ends(directions: pd.DataFrame, described: pd.DataFrame) -> pd.DataFrame:
    """The rows of the last step before the decay, and of the last of all."""
    parts = []
    for row in described.to_dict("records"):
        own = directions[directions["ensemble"] == row["ensemble"]]
        steps = sorted(own["step"].unique())
        before = [s for s in steps if pd.isna(row["decay_step"]) or s <= row["decay_step"]]
        chosen = {before[-1]: "at the first rate", steps[-1]: "at the end"}
        if before[-1] == steps[-1]:
            chosen = {steps[-1]: "at the end"}
        for step, when in chosen.items():
            parts.append(own[own["step"] == step].assign(when=f"{when}, step {step}"))
    ends = pd.concat(parts, ignore_index=True)
    kept: pd.DataFrame = ends[ends["law"].isin([EXACT, REFRESHED])].reset_index(drop=True)
    return kept


def within_goal(steps: pd.DataFrame) -> pd.DataFrame:
    """At how many of the recorded ``steps``, once settled, each law agrees with the replicas: ``within``.

    Without the laws that differ from ``refreshed`` only in the mean.
    """
    settled = steps[(steps["step"] >= SETTLED) & ~steps["law"].isin([NOISE_FREE, DRIFT])]
    settled = settled.dropna(subset=["geometric_mean"])
    near = settled.assign(within=settled["geometric_mean"].between(*GOAL))
    by = near.groupby(["ensemble", "law"], sort=False)["within"]
    return by.agg(within="sum", steps="size").reset_index()


def findings_of(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """How often each law is right, over all ensembles."""
    counts = tables["within_goal"].groupby("law")[["within", "steps"]].sum()
    said = ", ".join(
        f"{text} {counts['within'][law]} of {counts['steps'][law]}"
        for law, text in NAMES.items()
        if law in counts.index
    )
    findings = [
        f"Measured / predicted variance lies within {GOAL[0]} to {GOAL[1]} at these of the recorded steps "
        f"from step {SETTLED} on, all ensembles together: {said or 'none recorded'}."
    ]
    if "agreement" in tables and (tables["agreement"]["law"] == DRIFT).any():
        last = tables["agreement"].groupby(["ensemble", "law"], sort=False).last()["rms_offset"].unstack()
        left = last.dropna(subset=[DRIFT])[[REFRESHED, NOISE_FREE, DRIFT]].agg(["min", "max"])
        findings.append(
            "Of the mean's move, in predicted deviations (rms over directions), there is left at the last "
            "step, over all ensembles: "
            + ", ".join(
                f"{left[law].iloc[0]:.2f} to {left[law].iloc[1]:.2f} by {NAMES[law]}"
                for law in (REFRESHED, NOISE_FREE, DRIFT)
            )
            + "."
        )
    if "gaussianity" in tables and len(tested := tables["gaussianity"].dropna(subset=["kurtosis"])):
        rejected = [int((tested[f"{name}_p"] <= LEVEL).sum()) for name in ("skewness", "kurtosis")]
        findings.append(
            f"Mardia's joint tests reject that replicas are Gaussian, at the {LEVEL:.0%} level, at "
            f"{rejected[0]} (skewness) and {rejected[1]} (kurtosis) of {len(tested)} recorded steps, each "
            "tested by itself."
        )
    if "expansion" in tables:
        findings.append(
            "From the distance in expansion_breaks on, in predicted deviations (along random directions, "
            f"norms), the error exceeds {BREAKS:.0%} of the second-order term on the worse side."
        )
    return findings


def _slug(name: str) -> str:
    return "_".join(re.split(r"[\s,()=]+", name.lower().strip(" )")))


STUDY = Study("Do replicas reach the distribution of weights that curvature and noise predict?", answer)
