import pytest

from robustdyn.errors import RecordError
from robustdyn.records import find_runs
from robustdyn.studies.shared.comparing import require_alike, require_repetitions
from tests.records.synthetic import config, write_hydra


def runs_of(root, *changes):
    """Runs of seed 0, 1, ... whose settings are given, as ``section__leaf``."""
    for seed, changed in enumerate(changes):
        write_hydra(root / f"run{seed}", config(**({"seed": seed} | changed)))
    return find_runs(root)


def width_of(run):
    return str(run.config["model"]["width"])


@pytest.mark.parametrize(
    ("changed", "but"),
    [
        ({}, ()),
        ({"model__width": 8}, ["model"]),
        ({"model__width": 8}, ["model.width"]),
        ({"model__width": 8, "data__batch_size": 64}, ["data", "model"]),
        ({"resume": False, "checkpoint": {"every": 2}}, ()),  # change no result
        ({"data__root": "/elsewhere"}, ()),
    ],
)
def test_what_may_differ(tmp_path, changed, but):
    require_alike(runs_of(tmp_path, {}, changed), but)


@pytest.mark.parametrize("but", [[], ["mod"], ["model.width_of_another"], ["data"]])
def test_what_differs_besides_is_named_with_its_values(tmp_path, but):
    runs = runs_of(tmp_path, {}, {"model__width": 8}, {"model__width": 8})
    free = ", ".join(["seed", *but])
    with pytest.raises(RecordError) as caught:
        require_alike(runs, but, of="AT")
    assert str(caught.value) == (
        f"runs of AT differ in more than their {free}: model.width (16, 8); give those of one sweep, or some "
        "of them, as several paths or by a shell pattern"
    )


def test_what_comes_with_another_setting_differs_too(tmp_path):
    """Labels leave out what a typed setting implies; here it is a second difference."""
    runs = runs_of(tmp_path, {}, {"model__width": 8, "schedule__factor": 0.2, "data__batch_size": 64})
    with pytest.raises(
        RecordError, match=r"seed, model: data\.batch_size \(32, 64\), schedule\.factor \(0\.1, 0\.2\);"
    ):
        require_alike(runs, ["model"])


def test_repetitions_are_alike_within_their_setting(tmp_path):
    runs = runs_of(tmp_path / "a", {}, {}, {"seed": 0, "model__width": 8})
    require_repetitions(runs, width_of)
    with pytest.raises(RecordError, match=r"runs differ in more than their seed: model\.width \(16, 8\)"):
        require_repetitions(runs)
    runs = runs_of(tmp_path / "b", {"schedule__factor": 0.2}, {"model__width": 8}, {})
    with pytest.raises(RecordError, match=r"runs of 16 differ in more than their seed: schedule\.factor"):
        require_repetitions(runs, width_of)


def test_a_seed_counts_once(tmp_path):
    runs = runs_of(tmp_path, {}, {"seed": 0})
    with pytest.raises(RecordError, match=r"run1: seed 0 is that of .*run0 too; leave one out"):
        require_repetitions(runs)
    with pytest.raises(RecordError, match=r"run1: seed 0 of 16 is that of .*run0 too"):
        require_repetitions(runs, width_of)
