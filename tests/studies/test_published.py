"""The study of published runs, on runs of our own making and, where they are there, on the public curves."""

import numpy as np
import pandas as pd
import pytest

from robustdyn.errors import RecordError
from robustdyn.records import find_runs, read_table
from robustdyn.records.imported import write_runs
from robustdyn.records.training_logs import read_logs
from robustdyn.studies.published import DECAY, OF_BEST, SINCE, STUDY, THEMES, WINDOW
from robustdyn.studies.shared.comparing import BEST, FINAL, RISE
from tests.data.official import SHARED
from tests.records.logs import epoch_line, log_text
from tests.studies.curve_runs import decayed, write_curves

CURVES = SHARED / "published"
needs_curves = pytest.mark.skipif(not CURVES.is_dir(), reason="the published curves are not here")
PLAIN = "cifar10_standard/preactresnet18"


def write_logs(root, runs):
    """Logs by name: the robust test accuracies, the first epoch at 0.01 (its step ends the one before)."""
    for name, (accuracies, decay, arguments) in runs.items():
        lines = [
            epoch_line(epoch, 0.1 if epoch + 1 < decay else 0.01, test=("1.0", "0.8", f"{2 - a:.4f}", f"{a}"))
            for epoch, a in enumerate(accuracies)
        ]
        path = root / name / "output.log"
        path.parent.mkdir(parents=True)
        path.write_text(log_text(epochs=0, arguments={"fname": f"'{name}'"} | arguments) + "".join(lines))


def imported(tmp_path, runs):
    write_logs(tmp_path / "logs", runs)
    write_runs(read_logs([tmp_path / "logs"]), tmp_path / "out")
    return find_runs(tmp_path / "out")


def one_drop(epoch):
    return {"lr_schedule": "'onedrop'", "lr_drop_epoch": f"{epoch}", "lr_one_drop": "0.01"}


def test_a_theme_compares_the_runs_that_differ_in_one_setting(tmp_path):
    runs = imported(
        tmp_path,
        {
            PLAIN: ([0.2, 0.3, 0.4, 0.5, 0.55, 0.5, 0.1, 0.1], 4, {}),  # overfits after the decay
            "cifar10_dropepoch/preactresnet_3": ([0.2, 0.3, 0.4, 0.45, 0.43, 0.4], 3, one_drop(3)),
            "cifar10_cutout/preactresnet18_14": ([0.5] * 8, 4, {"cutout": "True", "cutout_len": "14"}),
            "cifar10_standard/wideresnet_10": (
                [0.9] * 8,
                4,
                {"attack": "'none'"},
            ),  # says nothing about robustness
        },
    )
    answer = STUDY.answer(runs)
    assert list(answer.tables) == ["decay_timing", "cutout"]
    timing = answer.tables["decay_timing"].set_index("setting")
    assert list(timing.index) == ["decay at 3", "decay at 4"]
    assert list(timing["epochs"]) == [6, 6]  # the plain run decays again later: it ends with the shortest
    assert list(timing[BEST]) == pytest.approx([55, 45])
    assert list(timing[FINAL]) == pytest.approx([60, 50])
    assert list(timing[RISE]) == pytest.approx([5, 5])
    assert list(timing[OF_BEST]) == [3, 4]
    assert list(timing[DECAY]) == [3, 4]
    assert list(timing[SINCE]) == [0, 0]
    assert list(timing["epoch of lowest loss"]) == [3, 4]
    assert list(timing["final gap"]) == pytest.approx([60 - 70, 50 - 70])  # less the error in training
    cutout = answer.tables["cutout"].set_index("setting")
    assert list(cutout.index) == ["none", "14 px"]
    assert cutout.loc["none", "epochs"] == 8
    assert answer.findings[0].startswith("Of 3 runs 2 end more than one percentage point above their best")
    assert "comes before the first decay in 1 of the 3 with one" in answer.findings[0]


def test_figures_draw_means_over_epochs_best_and_last(tmp_path):
    accuracies = np.linspace(0.2, 0.5, 2 * WINDOW)
    runs = imported(
        tmp_path,
        {
            PLAIN: (accuracies, 5, {}),
            "cifar10_mixup/preactresnet18_1.4": (accuracies / 2, 5, {"mixup": "True", "mixup_alpha": "1.4"}),
        },
    )
    (picture,) = STUDY.answer(runs).pictures
    assert picture.name == "regularisers"
    data = picture.data[picture.data["setting"] == "none"].set_index("quantity")
    curve = data.loc["test robust error"]
    assert list(curve["epoch"]) == [2, 7]
    errors = 100 * (1 - np.round(accuracies, 4))
    np.testing.assert_allclose(
        curve["value"], errors.reshape(2, WINDOW).mean(axis=1), atol=0.01
    )  # of four digits
    assert data.loc[BEST, "epoch"] == data.loc[FINAL, "epoch"] == 9
    assert data.loc[DECAY, "value"] == 5
    figure = picture.draw(picture.data)
    left, right = figure.axes
    assert left.get_title(loc="left") == "Mixup"
    assert [label.get_text() for label in right.get_yticklabels()] == ["α = 1.4", "none"]


def test_runs_of_our_own_and_runs_that_nothing_tells_apart_are_refused(tmp_path):
    own = write_curves(tmp_path / "own", lr=decayed(4, 2), test=[0.5] * 4, train=[0.4] * 4)
    with pytest.raises(RecordError, match="own: is no imported run; robustdyn-import makes them"):
        STUDY.answer(find_runs(own))
    alone = imported(tmp_path, {PLAIN: ([0.5] * 4, 2, {})})
    with pytest.raises(RecordError, match="no two runs of the published studies differ in one setting"):
        STUDY.answer(alone)
    twice = {
        f"cifar10_cutout/preactresnet18_{n}": ([0.5] * 4, 2, {"cutout": "True", "cutout_len": "2"})
        for n in "13"
    }
    with pytest.raises(RecordError, match=r"is cutout “2 px” as .* is; leave one out"):
        STUDY.answer(imported(tmp_path / "twice", twice))


# ---------------------------------------------------------------------- the public curves


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    output = tmp_path_factory.mktemp("published")
    write_runs(read_logs([CURVES / "epochs.csv"], CURVES / "runs.csv"), output)
    return find_runs(output)


@pytest.fixture(scope="module")
def answer(runs):
    return STUDY.answer(runs)


@needs_curves
def test_the_known_numbers_of_the_public_curves(runs):
    """Best and final accuracy and the best epoch, as the sources and their papers have them."""
    assert len(runs) == 88
    known = {
        ("robust_overfitting", PLAIN): (53.49, 106, 45.59),
        ("awp", "cifar10_linf/preactresnet18_awp"): (55.39, 159, 54.30),
    }
    for run in runs:
        wanted = known.pop((run.config["source"]["study"], run.config["name"]), None)
        if wanted:
            errors = read_table(run.path, "epochs")["test_robust_error"]
            found = (1 - errors.min()) * 100, int(errors.argmin()), (1 - errors.iloc[-1]) * 100
            assert found == pytest.approx(wanted)
    assert not known


@needs_curves
def test_every_theme_is_there_at_full_size(answer):
    assert list(answer.tables) == list(THEMES)
    assert {name: len(table) for name, table in answer.tables.items()} == {
        "decay_timing": 5,
        "second_rate": 5,
        "initial_rate": 5,
        "schedules": 8,
        "cutout": 11,
        "mixup": 11,
        "l2": 8,
        "l1": 5,
        "width": 13,
        "threat": 9,
        "awp": 14,
        "repeats": 4,
    }
    timing = answer.tables["decay_timing"]
    assert list(timing[DECAY]) == [60, 70, 80, 90, 100]
    assert set(timing["epochs"]) == {110}
    assert list(answer.tables["second_rate"]["setting"]) == [
        f"0.1 → {rate}" for rate in ("0.006", "0.008", "0.01", "0.03", "0.05")
    ]
    one_cycle = answer.tables["schedules"].set_index("setting").loc["one-cycle, up to 0.2"]
    assert one_cycle[FINAL] == pytest.approx(49.15)
    assert pd.isna(one_cycle[DECAY])
    svhn = answer.tables["threat"].set_index("setting").loc["SVHN, l∞"]
    assert (svhn[OF_BEST], svhn[DECAY], svhn[SINCE]) == (16, 100, -84)


@needs_curves
def test_figures_of_the_public_curves_can_be_drawn(answer):
    assert [picture.name for picture in answer.pictures] == ["rates", "regularisers", "networks_and_attacks"]
    for picture in answer.pictures:
        assert len(picture.draw(picture.data).axes) == 8
