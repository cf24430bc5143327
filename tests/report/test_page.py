import re
from html.parser import HTMLParser
from types import SimpleNamespace

import pandas as pd
import pytest

from robustdyn.errors import RecordError
from robustdyn.records import find_runs, read_table
from robustdyn.report.page import build_report
from robustdyn.report.page_tables import last_measures
from tests.records.synthetic import write_hydra, write_run


class Page(HTMLParser):
    """Tags and table rows of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.rows, self.words, self._cell = [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        self._cell = [] if tag in ("td", "th") else self._cell

    def handle_endtag(self, tag):
        if tag in ("td", "th") and self._cell is not None:
            self.rows[-1].append("".join(self._cell).strip())
            self._cell = None

    def handle_data(self, data):
        self.words.append(data)
        if self._cell is not None:
            self._cell.append(data)

    def named(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def report(methods, tmp_path_factory):
    return build_report([methods], tmp_path_factory.mktemp("report") / "new" / "folder")


@pytest.fixture(scope="module")
def page(report):
    return Page(report.html.read_text())


def test_the_page_needs_nothing_else(page, report):
    for tag, attrs in page.tags:
        for name in ("src", "href", "srcset", "poster", "data"):
            value = attrs.get(name)
            beside = ("#", "./") if tag == "a" else ("data:image/png;base64,",)
            assert value is None or value.startswith(beside), value
    assert [script.get("type") for script in page.named("script")] == ["application/json", None]
    assert not page.named("link")
    text = report.html.read_text()
    style = re.search(r"<style>(.*?)</style>", text, re.S).group(1)
    script = re.search(r"<script>(.*?)</script>", text, re.S).group(1)
    assert "url(" not in style
    assert "@import" not in style
    # the one address is the name of a vocabulary, which no one fetches
    assert re.findall(r"https?://[^\"]*", script) == ["http://www.w3.org/2000/svg"]


def test_the_page_is_accessible(page):
    assert page.named("html")[0]["lang"] == "en"
    assert page.named("meta")[1]["name"] == "viewport"
    images = page.named("img")
    assert len(images) == 13
    assert all(len(image["alt"]) > 20 for image in images)
    assert len(page.named("caption")) == len(page.named("table"))
    assert all("scope" in header for header in page.named("th"))
    assert "prefers-color-scheme: dark" in "".join(page.words)


def test_the_final_and_best_table_equals_the_records(page, methods):
    for run in find_runs(methods):
        recorded = read_table(run.path, "epochs").set_index("epoch")
        start = next(i for i, row in enumerate(page.rows) if row[:2] == [run.label, "final"])
        best = recorded["test_robust_error"].idxmin()
        for row, selection, epoch in (
            (page.rows[start][1:], "final", 39),
            (page.rows[start + 1], "best on test", best),
        ):
            facts = recorded.loc[epoch]
            assert row == [
                selection,
                str(epoch),
                f"{100 * facts['test_clean_error']:.2f}",
                f"{100 * facts['test_robust_error']:.2f}",
                f"{facts['test_robust_loss']:.3f}",
                f"{100 * facts['robust_error_gap']:.2f}",
                f"{facts['robust_loss_gap']:.3f}",
            ]


def test_means_over_seeds_stand_below_their_runs(page, methods):
    final = [read_table(r.path, "epochs")["test_robust_loss"].iloc[-1] for r in find_runs(methods)[:2]]
    row = next(row for row in page.rows if row[0] == "mean of 2 seeds, method=at")
    assert row[5] == f"{sum(final) / 2:.3f}"


def test_the_page_says_what_was_run(page):
    text = "".join(page.words)
    for words in (
        "PGD-10, l∞, ε = 51/255, step 12.75/255",
        "SGD: lr 0.1, momentum 0.9, weight decay 0.0005",
        "AWP: gamma 0.01",
        "Piecewise: milestones [20,32], factor 0.1",
        "every 5, on 256 training examples",
        "selected on test, as the papers report it",
        "Typed on the command line: method=awp seed=1",
    ):
        assert words in text, words
    assert ["perturbation.gamma", "none", "none", "0.01", "0.01", "none", "none"] in page.rows
    assert re.search(r"torch\s*2\.6\.0", text)


def test_tables_are_the_records_with_settings(report, methods):
    names = {path.name for path in report.tables}
    tables = (
        *("epochs", "rates", "wci", "layers", "spectrum", "alignment", "bounds", "density", "whole_space"),
        *("catoni", "posterior", "final_and_best"),
    )
    assert names == {f"{name}.{ending}" for name in tables for ending in ("parquet", "csv")}
    folder = report.html.parent / "tables"
    stored, text = pd.read_parquet(folder / "epochs.parquet"), pd.read_csv(folder / "epochs.csv")
    pd.testing.assert_frame_equal(stored, text, check_dtype=False)
    assert list(stored.columns[:4]) == ["run", "group", "method", "seed"]
    assert not any(column.startswith("validation") for column in stored)
    for run in find_runs(methods):
        own = stored[stored["run"] == run.label]
        assert (
            own["test_robust_error"].tolist() == read_table(run.path, "epochs")["test_robust_error"].tolist()
        )


def test_figures_lie_beside_the_page(report):
    assert len(report.figures) == 26
    assert all(path.is_file() and path.parent.name == "figures" for path in report.figures)


def test_the_report_of_another_time_is_replaced(tmp_path):
    run = write_run(tmp_path / "run", epochs=2, measured=(), experiment_name="<b>first & last</b>")
    for folder, name in (("figures", "wci_and_gap.png"), ("tables", "wci.csv")):
        (run / "report" / folder).mkdir(parents=True)
        (run / "report" / folder / name).write_text("stale")
    report = build_report(run, run / "report")
    assert not (run / "report/figures/wci_and_gap.png").exists()
    assert not (run / "report/tables/wci.csv").exists()
    text = report.html.read_text()
    assert "<b>first" not in text
    assert "&lt;b&gt;first &amp; last&lt;/b&gt;" in text
    assert "WCI and the robust gap: nothing is recorded in the table wci." in text
    assert "2 of 40 epochs finished" in text
    assert set(report.skipped) >= {"wci_and_gap", "spectrum", "bound_terms"}
    assert report.headline[2] == "WCI: not measured"


def test_runs_without_an_epoch_are_an_error_unless_others_have_some(tmp_path):
    write_hydra(tmp_path / "started", {"seed": 1})
    with pytest.raises(RecordError, match="no run has finished an epoch"):
        build_report(tmp_path, tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_an_output_that_cannot_be_written_is_named(tmp_path):
    run = write_run(tmp_path / "run", epochs=2, measured=())
    (tmp_path / "taken").write_text("")
    with pytest.raises(
        RecordError, match=r"taken: cannot write the report \(.*\); free space, or .* --output DIR"
    ):
        build_report(run, tmp_path / "taken")


def test_measures_of_the_last_epoch():
    frame = pd.DataFrame(
        [
            ("a", 0, "path_norm", 1.0, float("nan")),
            ("a", 4, "path_norm", 2.5, float("nan")),
            ("a", 4, "wci", 30.123, 0.25),
            ("b", 2, "wci", float("nan"), float("nan")),
        ],
        columns=["run", "epoch", "measure", "value", "value_se"],
    )
    runs = [SimpleNamespace(label=name) for name in ("a", "b", "without")]
    heads, rows = last_measures(runs, frame)
    assert heads == ("a, epoch 4", "b, epoch 2")
    assert rows == [("path_norm", ("2.5", "–")), ("wci", ("30.12 ± 0.25", "–"))]
