"""Ensembles whose losses are polynomials: every error and limit is known."""

import dataclasses

import numpy as np
import pytest
from matplotlib.lines import Line2D

from robustdyn.errors import RecordError
from robustdyn.replicas import EnsembleRecord, Lines, MeasuredPoint, read_ensemble
from robustdyn.studies.shared.expansion_figures import draw_expansion, expansion_tables
from tests.tolerances import EXACT64

LAMBDA = np.array([8.0, 2.0, 1.0])  # two eigenvectors and a random direction
SLOPES = np.array([16.0, 3.0, 1.0])
SIGMA = np.array([0.1, 0.2, 0.5])
GRADIENT = np.array([0.3, -0.2, 0.1])
MULTIPLES = np.array([-4.0, -2.0, -1.0, -0.5, 0.5, 1.0, 2.0, 4.0])
CUBIC, QUARTIC = 0.05, 0.01  # of the second-order term, at one deviation
START = 1.5
JITTER = np.array([-0.003, 0.003])  # of the loss at recomputed examples, in two draws


def lines(**changes):
    x = SIGMA[:, None] * MULTIPLES

    def loss(curvature):
        second = curvature[:, None] * x**2 / 2
        return START + GRADIENT[:, None] * x + second * (1 + CUBIC * MULTIPLES + QUARTIC * MULTIPLES**2)

    given = {
        "deviations": SIGMA,
        "multiples": MULTIPLES,
        "examples": 64,
        "starts": START + np.array([0.1, -0.1]),  # common to all points of a draw
        "gradient": GRADIENT,
        "hessian": np.diag(LAMBDA),
        "recomputed_gradient": GRADIENT[:, None] + SLOPES[:, None] * x * (1 + QUARTIC * MULTIPLES**2),
        "slopes": np.diag(SLOPES),
        "held": loss(LAMBDA),
        "recomputed": loss(SLOPES) + (np.array([0.1, -0.1]) + JITTER)[:, None, None],
    }
    return Lines(**(given | changes))


def start():
    three = np.zeros(3)
    blank = np.zeros((3, 3))
    vectors = np.eye(3)
    return MeasuredPoint.from_arrays(
        {
            "positions": vectors,
            "forces": vectors,
            "eigenvalues": LAMBDA,
            "residuals": np.array([1e-9, 1e-9, np.nan]),
            "converged": True,
            "hessian": np.diag(LAMBDA),
            "mean_gradient": GRADIENT,
            "decay_gradient": three,
            "example_covariance": blank,
            "attack_covariance": blank,
            "noise": blank,
            "sampled_gradients": np.empty((0, 3)),
            "sampled_again": np.empty((0, 3)),
            "slopes": blank,
            "slope_errors": blank,
            "slope_distances": three,
            "loss": START,
            "curvature_has_decay": False,
        },
        "cpu",
    )


def replicas(count, rest):
    """At steps 0 and 9, with ``rest`` ‖Δ‖² outside and curvature 1 there; twice that curvature recomputed."""
    x = np.random.default_rng(0).normal(size=(count, 2, 3)) * SIGMA
    x[:, 0] = 0
    outside = np.stack([np.zeros(count), np.full(count, rest**0.5)], axis=1)
    linear = START + x @ GRADIENT
    inside = (x**2 * LAMBDA).sum(axis=2) / 2
    expanded = linear + inside + outside**2 / 2
    recomputed = linear + (x**2 * SLOPES).sum(axis=2) / 2 + outside**2
    each = np.zeros((count, 2))
    draws = (np.array([0.1, -0.1]) + JITTER) * (np.arange(2) > 0)[:, None]
    return {
        "recomputed_loss": recomputed[:, :, None] + draws,
        "position": x,
        "buffer": x,
        "gradient": x,
        "distance": np.sqrt((x**2).sum(axis=2) + outside**2),
        "batch_loss": each,
        "robust_loss": recomputed,
        "robust_error": each,
        "mean_move": np.zeros((1, 0, 3), dtype=np.float32),
        "held_loss": expanded,
        "linear_loss": linear,
        "expanded_loss": expanded,
        "outside": outside,
    }


def ensemble(directory, *, rest=0.0, drop=(), measured=True, examples=64, **changes):
    settings = {
        "learning_rate": [0.1] * 9,
        "record.steps": [0, 9],
        "record.loss_steps": [0, 9],
        "record.loss_examples": examples,
        "record.mean_steps": [],
    }
    record = EnsembleRecord(directory, settings, {}, chunk=12)
    record.start(start, "cpu")
    record.add(range(12), {k: v for k, v in replicas(12, rest).items() if k not in drop})
    if measured:
        record.lines(lambda: lines(**changes))
    return read_ensemble(directory)


def only(table, **values):
    for name, value in values.items():
        table = table[table[name] == value]
    return table


def test_rises_and_errors_along_lines(tmp_path):
    table = expansion_tables({"AT": ensemble(tmp_path)})["expansion"]
    row = only(table, direction=1, kind="eigenvector", attack="held", distance=2.0, side=-1).iloc[0]
    second = 2.0 * 0.4**2 / 2
    assert row["first_order"] == pytest.approx(0.2 * 0.4)
    assert row["second_order"] == pytest.approx(second)
    assert row["expanded"] == pytest.approx(0.2 * 0.4 + second)
    assert row["error"] == pytest.approx(-2 * CUBIC + 4 * QUARTIC)
    assert row["error_se"] == 0
    assert row["rise"] == pytest.approx(0.08 + second * (1 - 2 * CUBIC + 4 * QUARTIC))
    recomputed = only(table, direction=0, kind="eigenvector", attack="recomputed", distance=0.5, side=1)
    errors = recomputed.set_index("curvature")
    by_slopes = errors.loc["J", "error"]
    assert by_slopes == pytest.approx(0.5 * CUBIC + 0.25 * QUARTIC)
    assert errors.loc["H", "error"] == pytest.approx(2 * (1 + by_slopes) - 1)  # J = 2 H
    # two draws ± 0.003 about the rise: what is common to a draw cancels
    assert errors.loc["H", "error_se"] == pytest.approx(0.003 / (8 * 0.05**2 / 2))
    kinds = table.drop_duplicates(["kind", "direction"])["kind"].value_counts()
    assert kinds.to_dict() == {"eigenvector": 2, "random": 1, "replica": 12}


def test_limits_are_where_the_error_crosses_a_fifth(tmp_path):
    """Linear between distances: 0.14 at 2 and 0.36 at 4 on the right; even, 0.04 and 0.16."""
    limits = expansion_tables({"AT": ensemble(tmp_path)})["expansion_limits"]
    held = only(limits, attack="held")
    error = 2 * CUBIC + 4 * QUARTIC, 4 * CUBIC + 16 * QUARTIC
    np.testing.assert_allclose(held["limit"], 2 + 2 * (0.2 - error[0]) / (error[1] - error[0]), **EXACT64)
    assert (held["bound"] == "").all()
    assert held["limit_of_mean"].tolist() == [4.0] * 3
    assert (held["bound_of_mean"] == "at least").all()
    by_hessian = only(limits, attack="recomputed", curvature="H").set_index("direction")
    # standard errors 0.003 / (λ σ² c² / 2) are a tenth or less from 1 deviation on, the last from 0.5 on
    assert by_hessian["limit"].tolist()[:2] == [1.0, 1.0]
    assert by_hessian["bound"].tolist() == ["at most", "at most", ""]  # the random direction has J = H
    assert by_hessian["bound_of_mean"].tolist() == ["at most", "at most", "at least"]


def test_means_pool_directions_and_sides(tmp_path):
    means = expansion_tables({"AT": ensemble(tmp_path)})["expansion_means"]
    rows = only(means, kind="eigenvector", distance=2.0).set_index(["attack", "curvature"])
    energy = (LAMBDA[:2] * SIGMA[:2] ** 2).mean() * 4 / 2
    sloped = (SLOPES[:2] * SIGMA[:2] ** 2).mean() * 4 / 2
    held, recomputed = rows.loc[("held", "H")], rows.loc[("recomputed", "H")]
    assert held["second_order"] == pytest.approx(energy)
    assert held["error"] == pytest.approx(4 * QUARTIC)
    assert held["error_se"] == 0
    assert held["points"] == 4
    assert recomputed["beyond"] == pytest.approx(sloped * (1 + 4 * QUARTIC))
    assert recomputed["error"] == pytest.approx(sloped * (1 + 4 * QUARTIC) / energy - 1)
    assert recomputed["error_se"] == pytest.approx(0.003 / energy)  # draws err alike at all points
    assert recomputed["slope_ratio"] == pytest.approx(sloped / energy * (1 + 4 * QUARTIC))
    odd = (SLOPES * SIGMA**3 * GRADIENT)[:2].sum() * CUBIC * 4 / 2 / (SIGMA**2 * GRADIENT**2)[:2].sum()
    assert recomputed["gradient_ratio"] == pytest.approx(1 + odd)
    assert recomputed["gradient_ratio_se"] == pytest.approx(0, abs=1e-12)  # both sides err alike
    assert rows.loc[("recomputed", "J"), "error"] == pytest.approx(4 * QUARTIC)


def test_replicas_know_the_slopes_along_the_directions_only(tmp_path):
    rest = 0.3
    tables = expansion_tables({"AT": ensemble(tmp_path, rest=rest)})
    table = only(tables["expansion_means"], kind="replica").set_index(["attack", "curvature"])
    x = replicas(12, rest)["position"][:, 1]
    inside = (x**2 * LAMBDA).sum(axis=1) / 2
    more = (x**2 * (SLOPES - LAMBDA)).sum(axis=1) / 2
    np.testing.assert_allclose(table.loc[("held", "H"), "error"], 0, atol=1e-12)
    whole = inside.mean() + rest / 2
    by_hessian = table.loc[("recomputed", "H")]
    assert by_hessian["error"] == pytest.approx((more.mean() + rest / 2) / whole)
    assert by_hessian["error_se"] == pytest.approx(0.003 / whole)
    by_slopes = table.loc[("recomputed", "J")]
    assert by_slopes["second_order"] == pytest.approx(whole + more.mean())
    assert by_slopes["error"] == pytest.approx(rest / 2 / (whole + more.mean()))
    assert by_slopes["distance"] == pytest.approx(np.sqrt(((x / SIGMA)[:, :2] ** 2).mean(axis=1)).mean())
    assert by_slopes["outside"] == pytest.approx(rest / ((x**2).sum(axis=1) + rest).mean())
    assert by_slopes["points"] == 12
    assert set(only(tables["expansion"], kind="replica")["step"]) == {9}  # at 0 all are at the start


def test_held_losses_of_replicas_scatter(tmp_path):
    recorded = ensemble(tmp_path)
    scatter = np.random.default_rng(3).normal(size=12) * 1e-3
    moved = dataclasses.replace(recorded, held_loss=recorded.held_loss + scatter[:, None])
    means = only(expansion_tables({"AT": moved})["expansion_means"], kind="replica", attack="held")
    noise = np.std(scatter, ddof=1) / np.sqrt(12)
    assert means["beyond_se"].item() == pytest.approx(noise)
    assert means["error"].item() == pytest.approx(scatter.mean() / means["second_order"].item())


def test_what_rounding_hides_has_no_error(tmp_path):
    hidden = np.diag([8.0, 2.0, 1e-9])
    table = expansion_tables({"AT": ensemble(tmp_path, hessian=hidden)})
    held = only(table["expansion"], kind="random", attack="held")
    assert held["error"].isna().all()
    assert np.isnan(only(table["expansion_limits"], kind="random", attack="held")["limit"].item())
    assert only(table["expansion_breaks"], kind="random", attack="held")["bound"].item() == "not known"


def test_ensembles_without_replicas_points_or_lines(tmp_path):
    names = ("recomputed_loss", "held_loss", "linear_loss", "expanded_loss", "outside")
    tables = expansion_tables({"AT": ensemble(tmp_path / "a", drop=names)})
    assert set(tables["expansion"]["kind"]) == {"eigenvector", "random"}
    assert len(draw_expansion(tables["expansion_means"]).axes) == 2
    with pytest.raises(RecordError, match="AWP: the loss along its directions was not measured"):
        expansion_tables({"AWP": ensemble(tmp_path / "b", measured=False)})
    with pytest.raises(RecordError, match=r"other examples or draws \(64, 2 and 32, 2\)"):
        expansion_tables({"AWP": ensemble(tmp_path / "c", examples=32)})


def test_one_draw_has_no_standard_error(tmp_path):
    two = lines()
    one = {"starts": two.starts[:1], "recomputed": two.recomputed[:1]}
    recorded = ensemble(
        tmp_path, drop=("recomputed_loss", "held_loss", "linear_loss", "expanded_loss", "outside"), **one
    )
    tables = expansion_tables({"AT": recorded})
    recomputed = only(tables["expansion"], attack="recomputed")
    assert recomputed["error_se"].isna().all()
    assert only(tables["expansion_limits"], attack="recomputed")["limit"].isna().all()
    assert set(only(tables["expansion_breaks"], attack="recomputed")["bound"]) == {"not known"}


def test_where_each_expansion_breaks(tmp_path):
    breaks = expansion_tables({"AT": ensemble(tmp_path, rest=0.3)})["expansion_breaks"]
    rows = breaks.set_index(["kind", "attack", "curvature"])
    assert rows.loc["eigenvector", "held", "H"]["limit"] == pytest.approx(2.5, abs=0.05)
    recomputed = rows.loc["eigenvector", "recomputed", "H"]
    assert (recomputed["bound"], recomputed["limit"]) == ("at most", pytest.approx(1, abs=0.05))
    assert rows.loc["random", "held", "H"]["limit"] == pytest.approx(2.5, abs=0.05)


def test_the_figure_draws_the_table(tmp_path):
    both = {"AT": ensemble(tmp_path / "a"), "AWP": ensemble(tmp_path / "b", rest=0.5)}
    figure = draw_expansion(expansion_tables(both)["expansion_means"])
    axes = np.array(figure.axes).reshape(2, 3)
    assert axes[1, 0].get_title(loc="left").startswith("AWP")
    of_panel = [line for line in axes[0, 0].get_lines() if isinstance(line, Line2D) and len(line.get_xdata())]
    marked, dashed = (
        [line for line in of_panel if line.get_linestyle() == style] for style in ("None", "--")
    )
    x = MULTIPLES[4:]
    held = (LAMBDA[:2] * SIGMA[:2] ** 2).mean() * x**2 / 2
    np.testing.assert_allclose(dashed[0].get_xydata(), np.stack([x, held], axis=1), **EXACT64)
    # odd orders cancel in the mean of both sides
    circles = [line for line in marked if line.get_marker() == "o"]
    np.testing.assert_allclose(circles[0].get_ydata(), held * (1 + QUARTIC * x**2), **EXACT64)
