import numpy as np
import pytest

from robustdyn.errors import RecordError
from robustdyn.records import find_runs
from robustdyn.studies.wci_gap import STUDY
from tests.runs import compose
from tests.studies.curve_runs import decayed, write_curves

EPOCHS = 12
LR = decayed(EPOCHS, 6)


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """Norm falls by e⁻² until the decay, trace rises by e⁴ after it; the gap goes with or against the WCI."""
    root = tmp_path_factory.mktemp("wci_gap")
    norm = np.exp(-2 * np.minimum(np.arange(EPOCHS), 5) / 5)
    trace = np.exp(4 * np.maximum(np.arange(EPOCHS) - 5, 0) / 6)
    gap = 0.05 * np.sqrt(norm * trace)
    for seed in (0, 1):
        for data, sign in (("SVHN", -1), ("CIFAR10", 1)):
            write_curves(
                root / f"{data}_{seed}",
                lr=LR,
                test=0.5 + sign * gap,
                train=[0.5] * EPOCHS,
                seed=seed,
                norm=norm,
                trace=trace,
                settings={"data._target_": f"robustdyn.data.{data}"},
            )
    return STUDY.answer(find_runs(root))


def test_correlations_have_the_sign_of_each_data_set(answered):
    r = answered.tables["correlations"]
    assert list(dict.fromkeys(r["panel"])) == ["CIFAR-10", "SVHN"]  # the paper's order
    np.testing.assert_allclose(r["pearson"], np.where(r["panel"] == "SVHN", -1, 1), rtol=1e-9)
    assert answered.findings[0].endswith("mean over seeds, is 1.00 on CIFAR-10, -1.00 on SVHN.")


def test_changes_of_the_wci_split_into_those_of_its_factors(answered):
    table = answered.tables["factors"]
    change = table[table["panel"] == "CIFAR-10"].set_index(["phase", "factor"])["mean"]
    want = {"before the first decay": (-1, -1, 0, 0), "after it": (2, 0, 2, 0)}
    for phase, logs in want.items():
        for factor, log in zip(("wci", "weight_norm_sq", "hessian_trace", "shape"), logs, strict=True):
            assert change[phase, factor] == pytest.approx(log, abs=1e-9)
    assert set(zip(table["from_epoch"], table["to_epoch"], strict=True)) == {(0, 5), (5, 11)}
    before, after = answered.findings[1].split("; ")
    assert before.endswith("is before the first decay ‖W‖_F (CIFAR-10), ‖W‖_F (SVHN)")
    assert after == "after it √Tr H (CIFAR-10), √Tr H (SVHN)."


def test_figures_draw_their_tables(answered):
    for picture, quantities in zip(
        answered.pictures,
        (["robust_loss_gap", "robust_error_gap", "wci"], ["weight_norm_sq", "hessian_trace", "wci"]),
        strict=True,
    ):
        figure = picture.draw(picture.data)
        assert [ax.get_title(loc="left") for ax in figure.axes[:2]] == ["CIFAR-10", "SVHN"]
        for ax, quantity in zip(figure.axes[1::2], quantities, strict=True):
            own = picture.data[(picture.data["panel"] == "SVHN") & (picture.data["quantity"] == quantity)]
            scale = 100 if quantity == "robust_error_gap" else 1
            np.testing.assert_allclose(ax.lines[0].get_ydata(), own["mean"] * scale)


def test_runs_without_measurement_are_refused(tmp_path):
    write_curves(tmp_path / "run", lr=LR, test=[0.5] * EPOCHS, train=[0.5] * EPOCHS)
    with pytest.raises(RecordError, match="needs measured WCI"):
        STUDY.answer(find_runs(tmp_path))


def test_the_preset_is_small_or_the_papers():
    small = compose("experiment=wci_gap", "data.root=somewhere")
    assert (small.data.partial, small.measure.measurements.spectrum) == (True, None)
    assert (small.data.test_from_train, small.data.test_size) == (None, 400)
    svhn = compose("experiment=wci_gap", "data=svhn").data
    assert (svhn.test_from_train, svhn.test_size) == (219, 219)  # the excerpt has no test file
    full = compose("experiment=wci_gap", "scale=full", "data.root=somewhere")
    assert (full.data.partial, full.data.train_size, full.data.test_from_train) == (False, None, None)
    assert (full.trainer.max_epochs, list(full.decay_epochs), full.model.width) == (200, [100, 150], 64)
