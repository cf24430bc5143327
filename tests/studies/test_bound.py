import numpy as np
import pytest

from robustdyn.errors import RecordError
from robustdyn.records import RunRecords, find_runs
from robustdyn.records.schema import CATONI
from robustdyn.studies.bound import STUDY, TERMS
from tests.runs import compose
from tests.studies.curve_runs import decayed, write_curves

EPOCHS = 12
LR = decayed(EPOCHS, 6)


def write_bound(path, totals, loss_range=5.0):
    """Rows of ``catoni`` whose KL makes the total."""
    records = RunRecords(path)
    for epoch, total in enumerate(totals):
        terms = {"empirical_loss": 0.5, "curvature": 0.01, "confidence": 0.02, "complexity": 0.1}
        kl = (total - sum(terms.values())) * 300
        row = terms | {"kl_mean": 0.2 * kl, "kl_trace": 0.1 * kl, "kl_log_determinant": 0.7 * kl, "kl": kl}
        row |= {"kl_over_beta": kl / 300, "total": total, "total_se": 0.05, "vacuous": total >= loss_range}
        row |= {"loss_range": loss_range, "covers": "all 90 parameters", "noise_free_parameters": 3}
        records.append("catoni", dict.fromkeys(CATONI.required) | row | {"epoch": epoch, "step": epoch + 1})


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """With AT the bound rises with the gap, with AWP it falls while the gap rises."""
    root = tmp_path_factory.mktemp("bound")
    gap = 0.02 * np.arange(EPOCHS)
    for seed in (0, 1):
        for method, sign, start in (("at", 1, 8.0), ("awp", -1, 6.0)):
            path = write_curves(
                root / f"{method}_{seed}",
                lr=LR,
                test=0.5 + gap,
                train=[0.5] * EPOCHS,
                seed=seed,
                settings={"perturbation._target_": f"robustdyn.methods.{method.upper()}"},
            )
            write_bound(path, start + seed + sign * 0.2 * np.arange(EPOCHS))
    return root


@pytest.fixture(scope="module")
def answered(runs):
    return STUDY.answer(find_runs(runs))


def test_rank_correlations_have_the_sign_of_each_method(answered):
    r = answered.tables["correlations"]
    own = r[(r["term"] == "total") & (r["quantity"] == "robust_loss_gap") & (r["phase"] == "all epochs")]
    assert dict(zip(own["setting"], own["mean"].round(9), strict=True)) == {"AT": 1.0, "AWP": -1.0}
    assert (own["seeds"] == 2).all()
    assert "is 1.00 [1.00, 1.00] with AT, -1.00 [-1.00, -1.00] with AWP." in answered.findings[0]
    constant = r[r["term"] == "empirical_loss"]
    assert constant.empty  # a term that does not move has no rank


def test_it_says_whether_the_bound_is_vacuous(answered):
    lowest = answered.tables["vacuous"].set_index(["setting", "seed"])
    # 6 + seed − 2.2 with AWP: below 5 for both seeds
    assert lowest["vacuous"].to_dict() == {
        ("AT", 0): True,
        ("AT", 1): True,
        ("AWP", 0): False,
        ("AWP", 1): False,
    }
    assert lowest.loc[("AWP", 1), "total"] == pytest.approx(4.8)
    assert "in 2 of 4 runs it is below" in answered.findings[1]
    (picture,) = answered.pictures
    figure = picture.draw(picture.data)
    assert "vacuous at 41 of 48 measured epochs" in figure._suptitle.get_text()


def test_the_figure_draws_its_table(answered):
    (picture,) = answered.pictures
    figure = picture.draw(picture.data)
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert titles == ["bound", "log determinant", "½ Tr(H₊Σ)", "robust loss gap", "robust error gap"]
    own = picture.data[(picture.data["setting"] == "AT") & (picture.data["quantity"] == "total")]
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), own["mean"])


def test_the_terms_add_up(answered):
    curves = answered.tables["curves"].pivot(index=["setting", "epoch"], columns="quantity", values="mean")
    np.testing.assert_allclose(curves[list(TERMS)].sum(axis=1), curves["total"])


def test_runs_without_a_bound_are_refused(tmp_path):
    write_curves(tmp_path / "run", lr=LR, test=[0.5] * EPOCHS, train=[0.5] * EPOCHS)
    with pytest.raises(RecordError, match="needs a measured bound; train with measure=bound or full"):
        STUDY.answer(find_runs(tmp_path))


def test_the_preset_measures_the_bound_alone():
    measure = compose("experiment=bound").measure
    assert [name for name, chosen in measure.measurements.items() if chosen] == ["density", "bound"]
    assert measure.measurements.bound.interpolation == measure.interpolation
