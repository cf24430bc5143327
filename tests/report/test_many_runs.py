"""Tests reports of more runs, settings or directions than a reader can tell apart."""

import os
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from robustdyn.records import combine, find_runs
from robustdyn.records.reader import combine_tables
from robustdyn.records.schema import TABLES, TEST_ROBUST_ERROR
from robustdyn.report import page as analysis
from robustdyn.report.figures import FIGURES
from robustdyn.report.page import build_report
from robustdyn.report.panels import MOST_DIRECTIONS
from robustdyn.report.shown import MOST_SETTINGS, shown_in_figures
from robustdyn.report.statistics import BEST_ON_TEST, FINAL
from tests.records.synthetic import write_run
from tests.report.test_page import Page

SPECS = {spec.name: spec for spec in FIGURES}


def frames_and_summary(errors):
    """Two runs of each setting; the final error of the second one is known only where the first one's is."""
    runs = [(f"s{i} seed={k}", f"s{i}", error) for i, error in enumerate(errors) for k in (0, 1)]
    epochs = pd.DataFrame([(run, group, 0) for run, group, _ in runs], columns=["run", "group", "epoch"])
    rows = [(run, group, FINAL, error) for run, group, error in runs]
    rows += [(run, group, BEST_ON_TEST, 1 - error) for run, group, error in runs]
    summary = pd.DataFrame(rows, columns=["run", "group", "selection", TEST_ROBUST_ERROR])
    return {"epochs": epochs, "wci": epochs.head(0)}, summary


def test_up_to_sixteen_settings_are_all_shown():
    frames, summary = frames_and_summary(np.linspace(0.1, 0.9, MOST_SETTINGS))
    assert shown_in_figures(frames, summary) == (frames, "")


def test_of_more_settings_the_best_and_the_worst_are_shown_best_first():
    order = np.random.default_rng(0).permutation(MOST_SETTINGS + 1)
    frames, summary = frames_and_summary(order / 100)
    part, which = shown_in_figures(frames, summary)
    ranked = [f"s{i}" for i in np.argsort(order)]
    chosen = ranked[:4] + ranked[-4:]
    assert part["epochs"]["group"].tolist() == [group for group in chosen for _ in range(2)]
    assert part["wci"].empty
    assert which == "the 4 best and the 4 worst of 17 settings by final test robust error, best first"


def test_settings_without_a_final_error_are_not_ranked():
    errors = [np.nan] * 12 + [0.1] * 5
    _, which = shown_in_figures(*frames_and_summary(errors))
    assert which == "the first 8 of 17 settings"
    errors[:4] = 0.1, 0.2, 0.3, 0.4
    part, _ = shown_in_figures(*frames_and_summary(errors))
    assert not set(part["epochs"]["group"]) & {f"s{i}" for i in range(4, 12)}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """One run more than figures show settings."""
    folder = tmp_path_factory.mktemp("sweep")
    for i in range(MOST_SETTINGS + 1):
        write_run(folder / f"r{i}", epochs=2, measured=(), optimizer__lr=(1 + i) / 1000)
    return folder


@pytest.mark.slow  # starts two processes, which import everything
def test_several_processes_write_what_one_writes(sweep, tmp_path, monkeypatch, rendered):
    specs = [SPECS[name] for name in ("learning_rate", "robust_error", "spectrum")]
    monkeypatch.setattr(analysis, "FIGURES", specs)
    reports = [build_report(sweep, tmp_path / str(n), processes=n) for n in (1, 2)]
    monkeypatch.chdir(tmp_path)  # the two processes continue elsewhere
    reports.append(build_report(sweep, "beside", processes=2))
    one, two, beside = ({path.name: path.read_bytes() for path in (r.html, *r.figures)} for r in reports)
    assert one == two == beside
    assert set(reports[0].skipped) == set(reports[1].skipped) == {"spectrum"}


@pytest.mark.slow  # as above
def test_a_figure_is_drawn_here_if_a_process_that_draws_is_killed(sweep, tmp_path, monkeypatch):
    here, spec = os.getpid(), SPECS["learning_rate"]

    def drawn(*tables):
        if os.getpid() != here:
            os._exit(1)
        return spec.function(*tables)

    monkeypatch.setattr(analysis, "FIGURES", [replace(spec, function=drawn), SPECS["robust_error"]])
    assert not build_report(sweep, tmp_path / "report", processes=2).skipped


def test_the_page_of_many_runs_says_what_it_leaves_out(sweep, tmp_path, monkeypatch):
    monkeypatch.setattr(analysis, "FIGURES", (SPECS["learning_rate"], SPECS["spectrum"]))
    report = build_report(sweep, tmp_path / "report")
    page = Page(report.html.read_text())
    words = " ".join("".join(page.words).split())
    which = "the 4 best and the 4 worst of 17 settings by final test robust error, best first"
    assert f"The figures show only {which}." in words
    assert f"Shown: {which}. The rate in force" in words
    assert report.skipped["spectrum"] == f"nothing is recorded in the table spectrum, for {which}"
    assert "smallest and largest rise of 17 settings" in words
    assert len([tag for tag, attrs in page.tags if tag == "details"]) == 2  # a configuration, and the columns
    assert "The configurations of the other 16 runs differ from this one in the settings above." in words
    (values,) = [row[1] for row in page.rows if row[0] == "optimizer.lr"]
    assert values == ", ".join(f"{(1 + i) / 1000:g}" for i in range(12)) + ", … (17 in all)"
    assert {f"optimizer.lr={(1 + i) / 1000:g}" for i in range(17)} <= {row[0] for row in page.rows if row}


def test_the_legend_says_which_settings_a_figure_shows(sweep):
    runs = find_runs(sweep)
    frames = combine_tables(runs, TABLES)
    figure = SPECS["learning_rate"].draw(frames, part="the best")
    assert figure.legends[0].get_title().get_text() == "the best"
    figure.draw_without_rendering()
    # the panel keeps most of the 3 inches that the figure of one run has
    assert figure.axes[0].get_position().height * figure.get_figheight() > 1.5


def test_tables_read_together_are_those_read_one_by_one(sweep):
    runs = find_runs(sweep)
    for name, frame in combine_tables(runs, ("epochs", "wci")).items():
        pd.testing.assert_frame_equal(frame, combine(runs, name))


def test_of_many_directions_some_are_drawn(one_frames):
    rows = one_frames["spectrum"]
    few = rows[rows["index"] == 0]
    many = pd.concat([few.assign(index=i, hessian_eigenvalue=2.0**-i) for i in range(100)])
    figure = SPECS["spectrum"].draw(one_frames | {"spectrum": many})
    lines = [line for line in figure.axes[0].lines if len(line.get_xdata()) > 2]
    drawn = sorted({-round(float(np.log2(line.get_ydata()[0]))) for line in lines})
    assert drawn[:9] == list(range(9))
    assert drawn[-1] == 99
    assert len(drawn) <= MOST_DIRECTIONS
    assert figure.axes[-1].get_ylabel().endswith(f", {len(drawn)} of 100 drawn")
    assert "top 100" in figure.axes[0].get_title(loc="left")
