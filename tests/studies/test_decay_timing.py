import pytest

from robustdyn.errors import RecordError
from robustdyn.records import find_runs
from robustdyn.studies.decay_timing import STUDY
from tests.runs import compose
from tests.studies.curve_runs import decayed, write_curves

EPOCHS = 8


def write(path, at, seed, final=0.5):
    test = [0.8, 0.6, 0.5, 0.45, 0.4, 0.42, 0.44, final]
    settings = {"schedule.milestones": [at]}
    return write_curves(path, lr=decayed(EPOCHS, at), test=test, train=test, seed=seed, settings=settings)


def test_settings_are_the_epochs_of_the_first_decay(tmp_path):
    for seed in (0, 1):
        for at, final in ((4, 0.5), (2, 0.5 + 0.01 * (seed + 1))):
            write(tmp_path / f"{at}_{seed}", at, seed, final)
    answer = STUDY.answer(find_runs(tmp_path))
    assert list(dict.fromkeys(answer.tables["outcomes"]["setting"])) == ["decay at 2", "decay at 4"]
    apart = answer.tables["differences"].set_index("outcome")
    assert set(apart["baseline"]) == {"decay at 4"}  # the latest, which is the papers'
    assert apart.loc["final robust error", "mean"] == pytest.approx(0.015)
    assert apart.loc["best robust error", "mean"] == 0
    assert apart.loc["rise of the robust error", "mean"] == pytest.approx(0.015)
    assert set(answer.pictures[0].data["quantity"]) == {
        "lr",
        "train_robust_error",
        "test_robust_error",
        "test_robust_loss",
        "robust_error_gap",
        "robust_loss_gap",
    }
    figure = answer.pictures[0].draw(answer.pictures[0].data)
    assert "decay of the rate, by colour" in {text.get_text() for text in figure.legends[0].get_texts()}
    assert figure.axes[0].get_ylim()[1] <= 100  # per cent, whatever the interval of two seeds


def test_a_run_without_a_decay_is_refused(tmp_path):
    write(tmp_path / "run", EPOCHS, 0)
    with pytest.raises(RecordError, match="never decays"):
        STUDY.answer(find_runs(tmp_path))


@pytest.mark.parametrize(("scale", "epochs"), [("small_short", [8, 24]), ("full", [25, 75])])
def test_the_preset_decays_at_fractions_of_any_run(scale, epochs):
    cfg = compose("experiment=decay_timing", f"scale={scale}", "decay_fractions=[0.125,0.375]")
    assert list(cfg.decay_epochs) == epochs
