"""A run held against a published curve: the table, the page, the figures, and settings that differ."""

import json

import numpy as np
import pandas as pd
import pytest

from robustdyn.errors import ConfigError
from robustdyn.records import RunRecords, combine, find_runs
from robustdyn.report.figures import FIGURES
from robustdyn.report.page import build_report
from robustdyn.report.plotting import Cast, named
from robustdyn.report.reference import REFERENCES, known_references, load_reference, spans
from tests.records.synthetic import write_hydra
from tests.report.test_page import Page
from tests.report.test_report_sweep import BROWSER, Shown
from tests.runs import compose

NAME = "published:cifar10_standard"


@pytest.fixture(scope="module")
def reference():
    return load_reference(NAME)


def settings(*overrides):
    """A whole CIFAR-10 run's configuration as its directory holds it, changed by overrides."""
    from omegaconf import OmegaConf

    config = compose("data=cifar10", "data.root=data", *overrides)
    return OmegaConf.to_container(config, resolve=False)


def write_curves(path, reference, place, config=None, epochs=200):
    """Write a run whose curves lie at ``place`` in the reference's band: 0 its centre, ±1 its ends."""
    write_hydra(path, {"trainer": {"max_epochs": epochs}} if config is None else config)
    bounds = reference.bounds.assign(value=lambda b: b["centre"] + place * (b["high"] - b["low"]) / 2).pivot(
        index="epoch", columns="quantity", values="value"
    )
    rows = [
        {"epoch": int(epoch), "step": int(epoch), "lr": 0.1, "seconds": 1.0, "train_clean_loss": 1.0}
        | {"train_clean_error": 0.5}
        | values.to_dict()
        for epoch, values in bounds.iloc[:epochs].iterrows()
    ]
    RunRecords(path).extend("epochs", rows)
    return path


def compared(reference, path):
    return reference.compare(combine(find_runs(path), "epochs"))


def test_the_reference_s_own_curve_lies_within_at_every_epoch(reference, tmp_path):
    rows = compared(reference, write_curves(tmp_path / "run", reference, 0.0))
    assert len(rows) == 8 * 200
    assert rows["within"].all()
    assert (rows["value"] == rows["centre"]).all()


@pytest.mark.parametrize(("place", "within"), [(0.99, True), (-0.99, True), (1.01, False), (-1.01, False)])
def test_the_ends_of_the_band_decide(reference, tmp_path, place, within):
    rows = compared(reference, write_curves(tmp_path / "run", reference, place))
    assert (rows["within"] == within).all()


def test_the_band_holds_what_the_study_reports(reference):
    """Its best robust test accuracy is 53.49 % at epoch 106 and its final one 45.59 %."""
    error = reference.of("test_robust_error", 199).set_index("epoch")
    for epoch, accuracy in ((106, 0.5349), (199, 0.4559)):
        assert error.loc[epoch, "low"] < 1 - accuracy < error.loc[epoch, "high"]
    assert (reference.bounds["low"] < reference.bounds["centre"]).all()
    assert (reference.bounds["centre"] < reference.bounds["high"]).all()
    assert reference.bounds.groupby("quantity")["epoch"].apply(list).map(len).eq(200).all()


def test_a_run_that_does_not_overfit_lies_below_the_band(reference, tmp_path):
    """The AWP study's run with AWP: its robust test accuracies after the decay."""
    accuracy = {110: 0.5366, 120: 0.5416, 130: 0.5384, 140: 0.5396, 150: 0.5389, 160: 0.5455, 170: 0.5515,
                180: 0.5525, 190: 0.5459, 199: 0.5430}  # fmt: skip
    path = write_curves(tmp_path / "run", reference, 0.0)
    file = path / "records" / "epochs.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        row["test_robust_error"] = 1 - accuracy.get(row["epoch"], 1 - row["test_robust_error"])
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    error = compared(reference, path).query("quantity == 'test_robust_error'").set_index("epoch")
    outside = error[~error["within"]]
    assert outside.index.tolist() == [epoch for epoch in accuracy if epoch > 110]
    assert (outside["value"] < outside["low"]).all()


def test_only_epochs_that_both_have_are_compared(reference, tmp_path):
    rows = compared(reference, write_curves(tmp_path / "run", reference, 0.0, epochs=30))
    assert set(rows["epoch"]) == set(range(30))


def test_our_full_protocol_differs_in_its_arithmetic_only(reference, tmp_path):
    for overrides, expected in (
        ((), ()),
        (("experiment=cifar10_at",), ("trainer.precision=bf16-mixed (reference: 32-true)",)),
    ):
        (run,) = find_runs(write_curves(tmp_path / str(len(overrides)), reference, 0.0, settings(*overrides)))
        differing = reference.differences(run)
        assert differing.changed == expected
        assert differing.unknown == ()


def test_settings_that_differ_are_named(reference, tmp_path):
    overrides = (
        "trainer.max_epochs=30",
        "attack.eps_255=4",
        "attack.evaluation.steps=20",
        "method=awp",
        "data.train_size=10000",
        "data.root=data/cifar10_jpeg",
    )
    (run,) = find_runs(write_curves(tmp_path / "run", reference, 0.0, settings(*overrides), epochs=30))
    assert set(reference.differences(run).changed) == {
        "trainer.max_epochs=30 (reference: 200)",
        "schedule.milestones=[15,22] (reference: [100,150])",
        "attack.eps_255=4 (reference: 8)",
        "attack.evaluation.steps=20 (reference: 10)",
        "perturbation._target_=robustdyn.methods.AWP (reference: none)",
        "data.train_size=10000 (reference: none)",
        "data.root=data/cifar10_jpeg, a lossy copy (reference: the official images)",
    }


def test_settings_that_were_not_recorded_are_named(reference, tmp_path):
    (run,) = find_runs(write_curves(tmp_path / "run", reference, 0.0))
    unknown = reference.differences(run).unknown
    assert "attack.eps_255" in unknown
    assert "trainer.max_epochs" not in unknown
    assert "perturbation._target_" not in unknown  # none is what the reference has


def test_the_page_says_how_the_run_stands(reference, tmp_path):
    path = write_curves(tmp_path / "run", reference, 0.0, settings("trainer.max_epochs=30"), epochs=30)
    file = path / "records" / "epochs.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for epoch in (3, 7, 8, 9):
        rows[epoch]["test_robust_loss"] += 1.0
    rows[20]["test_robust_loss"] -= 1.0
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    report = build_report(path, tmp_path / "report", reference=reference)
    assert report.headline[-1] == (
        f"{NAME}, epochs within its band: test robust error 30 of 30 (epochs 0–99); "
        "test robust loss 25 of 30 (epochs 0–99)"
    )
    page = Page(report.html.read_text())
    text = "".join(page.words)
    assert f"Against {NAME}" in text
    assert "trainer.max_epochs=30 (reference: 200)" in text
    row = next(row for row in page.rows if row[1:2] == ["test robust loss (nats)"])
    assert row == ["run", "test robust loss (nats)", "25 of 30", "–", "–", "3, 7–9", "20"]
    for ending, read in (("csv", pd.read_csv), ("parquet", pd.read_parquet)):
        stored = read(tmp_path / "report" / "tables" / f"reference.{ending}")
        assert (~stored["within"]).sum() == 5
    drawn = json.loads(next(word for word in page.words if word.startswith('{"colour')))
    assert drawn["reference"] == NAME
    (band,) = [panel["band"] for panel in drawn["panels"] if panel["name"] == "test_robust_error"]
    assert [len(part) for part in band] == [30] * 4
    bounds = reference.of("test_robust_error", 29)
    np.testing.assert_allclose(band[2], 100 * bounds["low"], rtol=1e-4)  # five digits

    # without the reference, nothing of it is left
    assert "Against" not in build_report(path, tmp_path / "report").html.read_text()
    assert not (tmp_path / "report" / "tables" / "reference.csv").exists()


@pytest.mark.parametrize("name", ["robust_loss", "robust_error"])
def test_the_figures_show_the_band_behind_the_curves(reference, tmp_path, name):
    path = write_curves(tmp_path / "run", reference, 0.0, epochs=30)
    frames = {"epochs": combine(find_runs(path), "epochs")}
    spec = next(spec for spec in FIGURES if spec.name == name)
    figure = spec.draw(frames, reference)
    left, right = figure.axes
    test = next(line for line in left.lines if line.get_linestyle() == "-" and line.get_color() != "#777777")
    bounds = reference.of(f"test_{name}", 29)
    scale = 100 if name == "robust_error" else 1
    corners = [c.get_paths()[0].vertices for c in left.collections if c.get_label() == "reference"]
    assert len(corners) == 2  # train and test
    assert any(np.isclose(v[:, 1].max(), scale * bounds["high"].max()) for v in corners)
    assert all(v[:, 0].max() == 29 for v in corners)  # as far as the run has come
    assert len(right.collections) == 1
    assert all(c.get_zorder() < test.get_zorder() for c in left.collections)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [f"{NAME}, its band"]
    assert not any(ax.collections for ax in spec.draw(frames).axes)


def test_a_figure_without_any_of_its_quantities_does_not_name_it(reference, tmp_path):
    frame = named(pd.DataFrame({"epoch": [0, 1], "lr": [0.1, 0.1]}))
    spec = next(spec for spec in FIGURES if spec.name == "learning_rate")
    figure = spec.function(frame, frame, Cast.of(frame, reference=reference))
    assert not figure.legends


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_the_page_s_own_curves_have_the_band_behind_them(reference, tmp_path):
    path = write_curves(tmp_path / "run", reference, 0.0, epochs=30)
    report = build_report(path, tmp_path / "report", reference=reference)
    shown = Shown(report.html, "", tmp_path / "browser")
    bands = [attrs["points"].split() for attrs in shown.named("polygon")]
    curves = [attrs["points"].split() for attrs in shown.named("polyline") if "curve" in attrs["class"]]
    centres = [attrs["points"].split() for attrs in shown.named("polyline") if "centre" in attrs["class"]]
    assert len(bands) == len(curves) == 3  # robust error, robust loss and its gap; no WCI
    assert all(len(band) == 2 * 30 for band in bands)
    assert centres == curves  # the run is the reference's centre
    height = {
        k: [float(p.split(",")[1]) for p in line] for k, line in (("band", bands[0]), ("run", curves[0]))
    }
    # downwards: the band's high end is above the run, its low end, from right to left, below
    assert all(high < y for high, y in zip(height["band"][:30], height["run"], strict=True))
    assert all(low > y for low, y in zip(height["band"][:29:-1], height["run"], strict=True))
    legend = [tag for tag, attrs in shown.tags if tag == "rect" and attrs.get("class") == "band"]
    assert len(legend) == 1


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(
        ConfigError, match=r"^--reference nonsense: not known; give one of: published:cifar10"
    ) as told:
        load_reference("nonsense")
    assert "\n" not in str(told.value)
    assert NAME in known_references()
    assert all((REFERENCES / f"{name.partition(':')[2]}.yaml").is_file() for name in known_references())


def test_spans():
    assert spans([]) == ""
    assert spans([3, 7, 8, 9, 11]) == "3, 7–9, 11"
