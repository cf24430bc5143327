import pytest

from robustdyn.errors import RecordError
from robustdyn.records import find_runs
from robustdyn.studies.rate_and_decay import STUDY
from tests.runs import compose
from tests.studies.curve_runs import decayed, write_curves

FINAL = {(0.1, 0.01): 0.45, (0.1, 0.001): 0.42, (0.01, 0.001): 0.6, (0.01, 0.0001): 0.65}


def test_settings_are_rates_before_and_after_the_decay(tmp_path):
    for seed in (0, 1):
        for (before, after), final in FINAL.items():
            test = [0.8, 0.7, 0.9 * final if before == 0.1 and after == 0.01 else final, final]
            write_curves(
                tmp_path / f"{before}_{after}_{seed}",
                lr=decayed(4, 2, (before, after)),
                test=test,
                train=test,
                seed=seed,
                settings={"optimizer.lr": before, "schedule.factor": after / before},
            )
    answer = STUDY.answer(find_runs(tmp_path))
    table = answer.tables["outcomes"]
    final = table[table["outcome"] == "final robust error"].set_index("setting")["mean"]
    assert final.to_dict() == pytest.approx({f"{b:g} → {a:g}": error for (b, a), error in FINAL.items()})
    figure = answer.pictures[0].draw(answer.pictures[0].data)
    assert {text.get_text() for ax in figure.axes for text in ax.texts if "η" in text.get_text()} == set()
    assert [text.get_text() for text in figure.axes[0].texts].count("decay") == 1  # to four different rates
    best, final = "“0.1 → 0.01” at the best epoch (40.5 ± 0.0 %)", "“0.1 → 0.001” at the end (42.0 ± 0.0 %)"
    assert answer.findings[0].endswith(f"is that of {best} and of {final}.")


def test_a_run_without_a_decay_is_refused(tmp_path):
    write_curves(tmp_path / "run", lr=[0.1] * 3, test=[0.5] * 3, train=[0.5] * 3)
    with pytest.raises(RecordError, match="never decays"):
        STUDY.answer(find_runs(tmp_path))


@pytest.mark.parametrize(("scale", "epoch"), [("small_short", 32), ("full", 100)])
def test_the_preset_decays_once_at_half_of_any_run(scale, epoch):
    assert list(compose("experiment=rate_and_decay", f"scale={scale}").decay_epochs) == [epoch]
