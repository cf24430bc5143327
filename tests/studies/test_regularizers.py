import numpy as np
import pytest
from scipy import stats

from robustdyn.records import find_runs
from robustdyn.studies.regularizers import STUDY
from tests.runs import compose
from tests.studies.curve_runs import decayed, write_curves

SETTINGS = {
    "none": {},
    "cutout 14 px": {"data.augment": {"cutout": 14}},
    "mixup α=1.4": {"data.mixup": 1.4},
    "l2 0.005": {"optimizer.weight_decay": 5e-3},
}


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """Final gaps 4, 3, 2, 1 tenths; final WCI 8 times that, and half a unit more with seed 1."""
    root = tmp_path_factory.mktemp("regularizers")
    for seed in (0, 1):
        for i, settings in enumerate(SETTINGS.values()):
            gap = (4 - i) / 10 * np.array([0.1, 0.2, 0.5, 0.9, 1.0])
            index = 80 * gap + 0.5 * seed
            write_curves(
                root / f"{i}_{seed}",
                lr=decayed(5, 2),
                test=0.4 + gap,
                train=[0.4] * 5,
                seed=seed,
                norm=np.ones(5),
                trace=(index / 0.8) ** 2,
                settings=settings,
            )
    return STUDY.answer(find_runs(root))


def test_settings_are_named_by_what_regularises(answered):
    table = answered.tables["outcomes"]
    assert set(table["setting"]) == set(SETTINGS)
    assert table["setting"].iloc[0] == "none"
    final = table[table["outcome"] == "final robust loss gap"].set_index("setting")["mean"]
    assert final.to_dict() == pytest.approx(dict(zip(SETTINGS, (1.6, 1.2, 0.8, 0.4), strict=True)))
    norm = table[table["outcome"] == "final squared weight norm"]["mean"]
    assert norm.to_list() == [1.0] * 4
    assert set(answered.tables["differences"]["baseline"]) == {"none"}


def test_wci_and_gap_are_correlated_within_runs_and_among_them(answered):
    within = answered.tables["correlations"]
    own = within[(within["setting"] == "mixup α=1.4") & (within["phase"] == "all epochs")]
    assert own["pearson"].to_list() == pytest.approx([1.0] * 4)
    assert set(own["epochs"]) == {5}
    index = np.array([80 * gap / 10 + 0.5 * seed for gap in (4, 3, 2, 1) for seed in (0, 1)])
    found = stats.pearsonr(index, np.repeat([1.6, 1.2, 0.8, 0.4], 2))
    low, high = found.confidence_interval(0.95)
    said = f"loss gap is {found.statistic:.2f} [{low:.2f}, {high:.2f}] over the 8 runs on digits."
    assert answered.findings[1] == f"The Pearson correlation of final WCI and final robust {said}"


def test_without_measurement_the_rest_is_answered(tmp_path):
    write_curves(tmp_path / "run", lr=decayed(4, 2), test=[0.5] * 4, train=[0.4] * 4)
    answer = STUDY.answer(find_runs(tmp_path))
    assert answer.findings[1].startswith("The runs say nothing about the WCI")
    assert set(answer.pictures[0].data["quantity"]).isdisjoint({"wci"})


@pytest.mark.parametrize(("scale", "side"), [("small_short", 3), ("full", 14)])
def test_each_choice_changes_one_thing(scale, side):
    plain = {"cutout": 0, "mixup": 0.0, "weight_decay": 5e-4}
    changed = {"cutout": side, "mixup": 1.4, "weight_decay": 5e-3}
    for choice, key in (("cutout", "cutout"), ("mixup", "mixup"), ("l2", "weight_decay")):
        cfg = compose("experiment=regularizers", f"scale={scale}", f"regularizer={choice}")
        found = {
            "cutout": cfg.data.augment.cutout,
            "mixup": cfg.data.mixup,
            "weight_decay": cfg.optimizer.weight_decay,
        }
        assert found == plain | {key: changed[key]}
        assert cfg.regularizer.weight_decay_on == "all"
