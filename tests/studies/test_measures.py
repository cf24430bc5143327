import itertools
import math
import re

import numpy as np
import pandas as pd
import pytest

from robustdyn.complexity import MEASURES, ComplexityMeasure
from robustdyn.defaults import config_dir
from robustdyn.errors import RecordError
from robustdyn.records import RunRecords, find_runs
from robustdyn.run.config import register_resolvers
from robustdyn.studies.measures import STUDY, findings_of, ranked
from robustdyn.studies.shared.ranking import Design, hoeffding_weights
from tests.runs import compose
from tests.studies.curve_runs import decayed, write_curves

LR = decayed(3, 2)
FACTORS = {"data.batch_size": (32, 64), "optimizer.weight_decay": (0.0, 5e-4), "attack.eps_255": (38, 51)}
ERRORS = {(batch, decay, eps): 0.2 + 0.2 * (batch == 64) + 0.1 * (eps == 51) + 0.05 * (decay > 0)
          for batch, decay, eps in itertools.product(*FACTORS.values())}  # fmt: skip


def write(path, error, measures, *, seed=0, measured=2, every=1, **settings):
    """A run of three epochs whose last gap is ``error``; of each measure its value, or why it has none."""
    settings = {"trainer.max_epochs": 3, "data.test_size": 1400} | settings
    test = [0.9, 0.8, 0.1 + error]
    write_curves(path, lr=LR, test=test, train=[0.9, 0.8, 0.1], seed=seed, settings=settings, every=every)
    for name, value in measures.items():
        row = {"epoch": measured, "step": 3, "measure": name, "gradients": 2.0, "seconds": 0.5}
        known = {"value": None, "undefined": value} if isinstance(value, str) else {"value": value}
        RunRecords(path).append("measures", row | known)


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """The WCI knows the gap, the norm its reverse, the margin the batch size alone; one is undefined."""
    root = tmp_path_factory.mktemp("measures")
    for (levels, error), seed in itertools.product(ERRORS.items(), (0, 1)):
        settings = dict(zip(FACTORS, levels, strict=True))
        own = error + 0.001 * seed
        found = {"wci": 100 * own, "norm": 1 / own, "margin": settings["data.batch_size"] / 2 + 0.0}
        found["path_norm"] = "no ReLU" if seed else 1.0
        found["thickness"] = "no two classes"
        write(root / f"{'_'.join(map(str, levels))}_{seed}", own, found, seed=seed, **settings)
    known = ComplexityMeasure(
        name="margin", label="", family="margin", source="", function=lambda network: None
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MEASURES, "margin", known)
        return STUDY.answer(find_runs(root))


def row(table, target, measure):
    return table[(table["target"] == target) & (table["measure"] == measure)].iloc[0]


def test_known_orders_have_known_coefficients(answered):
    table = answered.tables["ranking"]
    for target, name in itertools.product(
        ("robust_loss_gap", "robust_error_gap", "test_robust_error"), (0, 1)
    ):
        own, expected = row(table, target, ("wci", "norm")[name]), (1.0, -1.0)[name]
        assert own["tau"] == own["granulated"] == own["within_category"] == pytest.approx(expected)
        for end in ("seeds_low", "seeds_high", "settings_low", "settings_high"):
            assert own[f"tau_{end}"] == pytest.approx(expected)  # every pair agrees, whatever is left out
        assert own["conditional_information"] == pytest.approx(1.0)
        assert (own["rank"], own["runs"], own["gradients"], own["seconds"]) == (1, 16, 2.0, 0.5)
    margin = row(table, "robust_loss_gap", "margin")
    assert margin["tau"] == pytest.approx(64 / 120)  # pairs of different batch size: 8 · 8 of 16 · 15 / 2
    assert margin["granulated"] == pytest.approx(1 / 3)
    assert margin["conditional_information"] == pytest.approx(0.0, abs=1e-12)
    assert (margin["rank"], margin["family"]) == (3, "margin")
    assert pd.isna(row(table, "robust_loss_gap", "thickness")["family"])  # of no family that we know


def test_an_error_is_judged_by_the_pairs_whose_order_is_sure(answered):
    """Twelve seeds of two batch sizes; the measure is wrong in four, where the gaps hardly differ."""
    design = Design(pd.DataFrame({"batch": ["32", "64"] * 12}), np.repeat(range(12), 2).tolist())
    target = pd.Series([0.0, 0.001] * 4 + [0.0, 0.5] * 8)
    measure = pd.Series([1.0, 0.0] * 4 + [0.0, 1.0] * 8)
    every, parts = ranked(design, measure, target, np.ones((24, 24)))
    assert (every["sign_error_mean"], every["environments"]) == (pytest.approx(4 / 12), 1)
    assert parts["sign_error_max"].tolist() == [pytest.approx(4 / 12)]
    sure, _ = ranked(design, measure, target, hoeffding_weights(target, 1400))
    assert sure["environments"] == 0  # eight pairs are too few
    both = [pd.concat([values] * 2, ignore_index=True) for values in (measure, target)]
    twice = Design(pd.concat([design.levels] * 2, ignore_index=True), np.repeat(range(24), 2).tolist())
    sure, _ = ranked(twice, *both, hoeffding_weights(both[1], 1400))
    assert (sure["sign_error_max"], sure["environments"]) == (0.0, 1)
    # eight settings and two seeds have four pairs in each environment
    assert set(answered.tables["ranking"]["environments"]) == {0}


def test_coefficients_by_factor(answered):
    table = answered.tables["by_factor"]
    own = table[(table["target"] == "robust_error_gap") & (table["measure"] == "margin")].set_index("factor")
    assert own["granulated"].to_dict() == {"data.batch_size": 1.0, "optimizer.weight_decay": 0.0,
                                           "attack.eps_255": 0.0}  # fmt: skip
    assert own.loc["data.batch_size", "within_category"] == 0.0
    assert own.loc["attack.eps_255", "within_category"] == pytest.approx(16 / 28)


def test_undefined_measures_are_ranked_where_they_have_a_value(answered):
    table = answered.tables["ranking"]
    some, none = (row(table, "robust_loss_gap", name) for name in ("path_norm", "thickness"))
    assert (some["runs"], some["undefined"], some["tau"]) == (8, "no ReLU", 0.0)
    assert math.isnan(some["tau_seeds_low"])  # one seed
    assert (none["runs"], none["undefined"]) == (0, "no two classes")
    assert math.isnan(none["tau"])
    assert "thickness" not in set(answered.pictures[0].data["measure"])
    assert len(answered.tables["values"]) == 16


def test_findings_say_what_leads_and_where_the_wci_stands(answered, tmp_path):
    first, second = answered.findings
    said = "τ 1.00, 95 % over settings [1.00, 1.00], Ψ 1.00"
    assert first.startswith(
        f"Of 4 measures, the one with the largest |τ| is wci for the robust loss gap ({said})"
    )
    assert second.startswith(
        f"The WCI has rank 1 of 4 for the robust loss gap ({said}), 1 of 4 for the robust"
    )
    read = {}
    for name, table in answered.tables.items():
        table.to_csv(tmp_path / name, index=False)
        read[name] = pd.read_csv(tmp_path / name)
    assert findings_of(read) == [first, second]
    without = {"ranking": answered.tables["ranking"].query("measure != 'wci'")}
    assert findings_of(without)[1] == (
        "The WCI is not among the measures; the training loss alone has τ 0.00, 0.00, 0.00 for the same "
        "targets."  # it is the same in all runs
    )
    standing = answered.tables["standing"]
    assert set(standing["measure"]) == {"wci", "norm", "margin", "path_norm", "train_robust_loss"}
    assert standing["target"].iloc[0] == "robust_loss_gap"


def test_the_figure_draws_its_table(answered):
    (picture,) = answered.pictures
    figure = picture.draw(picture.data)
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == ["norm", "train_robust_loss", "path_norm", "margin", "wci"]  # from below
    for ax, target in zip(
        figure.axes, ("robust_loss_gap", "robust_error_gap", "test_robust_error"), strict=True
    ):
        own = picture.data[picture.data["target"] == target]
        for line, coefficient in zip(ax.lines, ("factor", "granulated", "tau"), strict=False):
            rows = own[own["coefficient"] == coefficient]
            np.testing.assert_array_equal(line.get_xdata(), rows["value"])
            np.testing.assert_array_equal(line.get_ydata(), [names.index(name) for name in rows["measure"]])


@pytest.mark.parametrize(
    ("last", "message"),
    [
        ({"measures": {}}, "no measures recorded; train with measure=measures"),
        ({"measured": 1, "every": 3}, "not evaluated at epoch 1, the last one measured"),
        ({"trainer.max_epochs": 9}, "evaluated up to epoch 3 of 9; finish it"),
        ({"data.batch_size": 1}, "seed 0 of data.batch_size=1 is that of .* too; leave one out"),
        ({"data.test_size": None}, "how many test images there are is not known; train with data.test_size"),
    ],
)
def test_runs_that_cannot_be_ranked_are_named(tmp_path, last, message):
    for batch in (1, 2, 3):
        write(tmp_path / f"{batch}", batch / 10, {"wci": batch}, **{"data.batch_size": batch})
    settings = {"data.batch_size": 4, "measures": {"wci": 4}} | last
    write(tmp_path / "4", 0.4, **settings)
    with pytest.raises(RecordError, match=message):
        STUDY.answer(find_runs(tmp_path))


def test_two_runs_are_too_few(tmp_path):
    for batch in (1, 2):
        write(tmp_path / f"{batch}", batch / 10, {"wci": batch}, **{"data.batch_size": batch})
    with pytest.raises(RecordError, match="2 of the three runs or more that can be ranked"):
        STUDY.answer(find_runs(tmp_path))


def test_the_preset_is_a_hundred_small_runs_or_the_papers():
    register_resolvers()
    small, full = (compose("experiment=measures", scale) for scale in ("scale=small_many", "scale=full"))
    assert (small.data.train_size, small.data.test_size, small.trainer.max_epochs) == (300, 1400, 24)
    assert (small.trainer.check_val_every_n_epoch, small.measure.epochs) == (24, "last")
    assert (small.attack.train.steps, small.attack.evaluation.steps) == (5, 10)
    assert list(small.decay_epochs) == [7, 21]
    assert (full.data.train_size, full.trainer.max_epochs, full.measure.epochs) == (None, 200, "last")


def test_the_sweep_crosses_its_factors_in_at_least_96_runs():
    text = (config_dir() / "experiment" / "measures.yaml").read_text().partition("params:")[2]
    levels = {key: values.split(",") for key, values in re.findall(r"(?m)^      ([\w.]+): (\S+)", text)}
    assert levels["seed"] == ["0", "1"]
    assert min(map(len, levels.values())) >= 2
    assert math.prod(map(len, levels.values())) >= 96
    for key, values in levels.items():
        for value in values:
            compose("experiment=measures", f"{key}={value}")
