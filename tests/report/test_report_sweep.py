"""Tests the part of the page that shows a sweep's runs side by side: table, filters, curves, missing runs."""

import base64
import hashlib
import json
import re
import shlex
import shutil
import subprocess
from collections import Counter
from urllib.parse import unquote

import pytest
import yaml

from robustdyn.errors import RecordError
from robustdyn.records import RunRecords, combine, find_runs, read_table
from robustdyn.records.progress import Plan, run_states
from robustdyn.report import page as analysis
from robustdyn.report.overview import PANELS, overview
from robustdyn.report.page import build_report
from robustdyn.report.page_tables import duration
from robustdyn.report.statistics import final_and_best
from tests.records.synthetic import config, write_hydra, write_run
from tests.report.test_page import Page

EVIL = "</script><script>window.evil=1</script><img src=x onerror=evil()>&\"'\u2028"
JOBS = (
    *((f"method={method}", f"seed={seed}") for method in ("at", "awp") for seed in (0, 1)),
    ("method=at", "seed=2"),
    ("method=awp", "seed=2"),
)


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Pages without figures: they have tests of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(analysis, "FIGURES", ())
        yield


def status(run, state, error=None):
    (run / "status.json").write_text(json.dumps({"state": state, "error": error, "settings": {}}))


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Four runs done, one failed before its first epoch, one never started."""
    folder = tmp_path_factory.mktemp("sweep") / "my sweep"
    for method in ("at", "awp"):
        for seed in (0, 1):
            run = write_run(folder / f"method={method},seed={seed}", method, seed, measured=(0, 20, 39))
            status(run, "done")
    failed = folder / "method=at,seed=2"
    write_hydra(failed, config("at", 2), JOBS[4], {"method": "at"})
    status(failed, "failed", f"RuntimeError: {EVIL}")
    (failed / "error.txt").write_text("...")
    first = folder / "method=at,seed=0"
    (first / "log.jsonl").write_text("")
    (first / "report").mkdir()
    (first / "report" / "index.html").write_text("")
    task, own = ["method=at,awp", "seed=range(0,3)"], ["hydra.mode=MULTIRUN", "hydra/launcher=slurm"]
    hydra = {"task": task, "hydra": own}
    (folder / "multirun.yaml").write_text(json.dumps({"hydra": {"overrides": hydra}}))
    evaluate(first, "best_on_test")
    return folder


def evaluate(run, name):
    records = RunRecords(run / "evaluation" / name)
    blank = dict.fromkeys(("norm", "eps", "loss", "step_size", "steps", "restarts"))
    same = {"examples": 540, "accuracy_se": 0.0123, "seconds": 1.0, **blank}
    found = {
        "clean": 0.95,
        "autoattack/square": 0.8,
        "worst_case": 0.79,
        "autoattack": 0.79,
        "unbounded": 0.01,
    }
    records.extend("evaluation", [{"evaluator": k, "accuracy": a, **same} for k, a in found.items()])
    records.append("warnings", {"check": "zero_gradient", "evaluator": "model", "message": EVIL})
    about = {"evaluation.split": "test", "evaluation.examples": 540}
    about |= {"attack.norm": "linf", "attack.eps_255": 51.0}
    attacks = {"unbounded": {"in_ball": False}, "autoattack/square": {"in_ball": True}}
    settings = {"evaluation": about, "evaluators": {"all": {"attacks": attacks}}}
    (run / "evaluation" / name / "settings.json").write_text(json.dumps(settings))


@pytest.fixture(scope="module")
def states(sweep):
    return run_states(find_runs(sweep), Plan(JOBS, ("method", "seed"), ()))


@pytest.fixture(scope="module")
def report(sweep, states):
    return build_report([sweep], sweep / "report", states)


@pytest.fixture(scope="module")
def text(report):
    return report.html.read_text()


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


@pytest.fixture(scope="module")
def curves(text):
    return json.loads(re.search(r'<script type="application/json"[^>]*>(.*?)</script>', text, re.S).group(1))


def row_of(page, *start):
    (row,) = [row for row in page.rows if row[: len(start)] == list(start)]
    return row


def test_every_run_has_a_row_with_its_factors_and_numbers(page, sweep):
    heads = row_of(page, "run", "state", "method", "seed")
    assert heads[4:] == [
        "best test robust error (%)",
        "final test robust error (%)",
        "final test robust loss (nats)",
        "final robust loss gap (nats)",
        "last WCI",
    ]
    for run in find_runs(sweep):
        epochs, wci = read_table(run.path, "epochs"), read_table(run.path, "wci")
        if epochs.empty:
            continue
        best, last = epochs.loc[epochs["test_robust_error"].idxmin()], epochs.iloc[-1]
        own = f"{run.label}report log" if run.label == "method=at seed=0" else run.label
        row = row_of(page, own, "done40 of 40 epochs finished")
        assert row[2:4] == [run.choices["method"], str(run.config["seed"])]
        assert row[4:9] == [
            f"{100 * best['test_robust_error']:.2f}epoch {best['epoch']:.0f}",
            f"{100 * last['test_robust_error']:.2f}epoch 39",
            f"{last['test_robust_loss']:.3f}epoch 39",
            f"{last['robust_loss_gap']:.3f}epoch 39",
            f"{wci['wci'].iloc[-1]:.1f}epoch 39",
        ]
    assert row_of(page, "method=at seed=2traceback", "failed0 of 40 epochs finished")[2:9] == [
        "at",
        "2",
        *"–––––",
    ]
    assert row_of(page, "method=awp seed=2", "missing", "awp")[2:] == ["awp", "2", *"–––––"]


def test_links_lead_to_what_is_there(page, report, sweep):
    targets = [unquote(attrs["href"]) for attrs in page.named("a") if attrs["href"].startswith("./")]
    for target in targets:
        assert (report.html.parent / target).exists(), target
    found = {(report.html.parent / target).resolve() for target in targets}
    first = sweep / "method=at,seed=0"
    assert found >= {
        first.resolve(),
        (first / "log.jsonl").resolve(),
        (first / "report/index.html").resolve(),
    }
    assert (first / "evaluation/best_on_test").resolve() in found
    assert (sweep / "method=at,seed=2/error.txt").resolve() in found


def test_a_page_does_not_link_to_itself(tmp_path):
    run = write_run(tmp_path / "run", epochs=2, measured=())
    for _ in range(2):
        report = build_report(run, run / "report")
    hrefs = [attrs["href"] for attrs in Page(report.html.read_text()).named("a")]
    assert "./../" in hrefs
    assert not any("index.html" in href for href in hrefs)


def test_what_is_not_done_comes_with_its_command(page, sweep):
    caption = re.search(r"What is not done is done by:[^\n]*", "".join(page.words)).group()
    command = shlex.split(caption.partition("is done by: ")[2])
    assert command == [
        *("robustdyn-train", "-m", "method=at,awp", "seed=range(0,3)", "hydra/launcher=slurm"),
        f"hydra.sweep.dir={sweep}",
    ]
    failed = row_of(page, "method=at seed=2", "failed")
    assert failed[2].startswith("RuntimeError: </script>")
    run = sweep / "method=at,seed=2"
    assert shlex.split(failed[3]) == ["robustdyn-train", f"hydra.run.dir={run}", "method=at", "seed=2"]
    assert row_of(page, "method=awp seed=2", "missing", "was never started")[3] == "by the command above"


def test_a_run_of_an_experiment_is_repeated_alone_not_as_a_sweep(tmp_path):
    run = write_run(tmp_path / "run", epochs=2, measured=())
    (run / ".hydra/overrides.yaml").write_text('["experiment=demo", "seed=0"]')
    status(run, "failed", "killed")
    page = Page(build_report(run, tmp_path / "report").html.read_text())
    words = shlex.split(row_of(page, "run", "failed")[3])
    assert words == ["robustdyn-train", "hydra.mode=RUN", f"hydra.run.dir={run}", "experiment=demo", "seed=0"]


def test_filters_offer_every_value_of_every_factor(page):
    boxes = [(attrs["name"], attrs["value"]) for attrs in page.named("input")]
    assert boxes == [
        *(("method", "at"), ("method", "awp"), ("seed", "0"), ("seed", "1"), ("seed", "2")),
        *(("state", "done"), ("state", "failed"), ("state", "missing")),
    ]
    words = " ".join("".join(page.words).split())
    assert "at (3)" in words
    assert "4 done, 1 failed, 1 missing" in words


def test_a_setting_that_only_missing_runs_change_is_a_factor(tmp_path):
    run = write_run(tmp_path / "run", epochs=2, measured=())
    (run / ".hydra/overrides.yaml").write_text('["schedule.factor=1e-1"]')
    jobs = (("schedule.factor=1e-1",), ("schedule.factor=5e-1",))
    found = find_runs(tmp_path)
    frames = {name: combine(found, name) for name in ("epochs", "wci")}
    states = run_states(found, Plan(jobs, ("schedule.factor",), ()))
    shown = overview(found, states, frames, final_and_best(found, frames["epochs"]), tmp_path / "index.html")
    assert [(f.key, f.values) for f in shown.factors] == [("schedule.factor", ("0.1", "0.5"))]
    assert [row.factors for row in shown.rows] == [("0.1",), ("0.5",)]


def test_curves_are_the_records_to_five_digits(curves, sweep):
    assert [panel["name"] for panel in curves["panels"]] == [column for _, column in PANELS]
    runs = {run.label: run for run in find_runs(sweep)}
    for (table, column), panel in zip(PANELS, curves["panels"], strict=True):
        for row, points in zip(curves["rows"], panel["points"], strict=True):
            if row["state"] != "done":
                assert points is None
                continue
            recorded = read_table(runs[row["name"]].path, table)
            assert points[0] == recorded["epoch"].tolist()
            scale = 100 if column.endswith("error") else 1
            # five significant digits: half a unit in the fifth
            assert points[1] == pytest.approx((scale * recorded[column]).tolist(), rel=5.1e-5)
    assert curves["rows"][0]["decays"] == [20, 32]
    assert curves["colour"] == "method"


def test_names_and_errors_cannot_leave_their_place(text, page):
    assert "<script>window" not in text
    assert "<img src=x" not in text
    assert "\u2028" not in re.search(r'type="application/json".*?</script>', text, re.S).group(0)
    script = re.findall(r"<script>(.*?)</script>", text, re.S)
    assert len(script) == 1
    assert len(page.named("script")) == 2
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    (policy,) = [attrs["content"] for attrs in page.named("meta") if "http-equiv" in attrs]
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_a_value_of_markup_stays_text(tmp_path):
    for i, value in enumerate((EVIL, "plain")):
        run = write_run(tmp_path / f"r{i}", epochs=2, measured=(), schedule__note=value)
        (run / ".hydra/overrides.yaml").write_text("[]")
    text = build_report(tmp_path, tmp_path / "report").html.read_text()
    page = Page(text)
    assert "<script>window" not in text
    assert len(page.named("script")) == 2
    assert EVIL in [attrs["value"] for attrs in page.named("input")]
    data = json.loads(re.search(r'application/json"[^>]*>(.*?)</script>', text, re.S).group(1))
    assert EVIL in data["factors"][0]["values"]


def test_evaluations_are_on_the_page_and_in_a_table(page, report, sweep):
    head = row_of(page, "run", "checkpoint", "on", "ball")
    assert head[4:] == ["clean", "autoattack", "worst_case", "unbounded (a check: should be 0)"]
    row = row_of(page, "method=at seed=0", "best_on_test")
    assert row[2:] == [
        "540 test",
        "linf, 51/255",
        *(f"{a} ± 1.23" for a in ("95.00", "79.00", "79.00", "1.00")),
    ]
    assert "Robustness may be overstated" in "".join(page.words)
    table = (report.html.parent / "tables/evaluation.csv").read_text().splitlines()
    assert table[0].startswith('"run","group","checkpoint","evaluator","examples","accuracy"')
    assert len(table) == 6


def test_an_evaluation_under_way_is_said_and_a_broken_one_is_an_error(tmp_path):
    run = write_run(tmp_path / "run", epochs=2, measured=())
    folder = run / "evaluation" / "last"
    folder.mkdir(parents=True)
    (folder / "settings.json").write_text("{}")
    assert "Evaluations" not in build_report(run, tmp_path / "report").html.read_text()
    (folder / "settings.json").write_text('{"evaluation": {"evaluation.split": "test"}}')
    assert "no result yet" in build_report(run, tmp_path / "report").html.read_text()
    (folder / "records").mkdir()
    (folder / "records/evaluation.jsonl").write_text('{"evaluator"\n{}\n')
    with pytest.raises(RecordError, match=r"evaluation.jsonl, line 1: not a record; evaluate again"):
        build_report(run, tmp_path / "report")


def test_times_are_on_the_page_where_they_are_recorded(tmp_path, text):
    assert 'id="timing"' not in text
    run = write_run(tmp_path / "run", epochs=3, measured=())
    shares = dict.fromkeys(("step_share", "data_share", "evaluation_share", "measurement_share"), 0.1)
    timed = ((10.0, 60.0, 0.9), (100.0, 20.0, 0.5), (120.0, 20.0, 0.5))  # the first compiles
    rows = [
        {"epoch": e, "step": e + 1, "images_per_second": s, "attack_share": a, "seconds": t, **shares}
        for e, (s, t, a) in enumerate(timed)
    ]
    RunRecords(run).extend("timing", rows)
    page = Page(build_report(run, tmp_path / "report").html.read_text())
    # attack: (60 · 0.9 + 20 · 0.5 + 20 · 0.5) / 100
    assert row_of(page, "run", "cpu") == ["run", "cpu", "3", "1 min 40 s", "100", "–", "74.0", *["10.0"] * 4]


def test_durations_are_read_at_a_glance():
    assert [duration(s) for s in (2.34, 45.2, 200, 3600 * 26 + 300)] == [
        *("2.3 s", "45 s", "3 min 20 s", "26 h 5 min")
    ]


def test_means_leave_out_runs_that_failed(tmp_path):
    for seed in (0, 1, 2):
        run = write_run(tmp_path / f"r{seed}", seed=seed, epochs=3 if seed == 2 else 40, measured=())
        status(run, "failed" if seed == 2 else "done", "killed")
    report = build_report(tmp_path, tmp_path / "report")
    page = Page(report.html.read_text())
    last = [read_table(tmp_path / f"r{seed}", "epochs")["test_robust_loss"].iloc[-1] for seed in (0, 1)]
    assert row_of(page, "mean of 2 seeds", "final")[5] == f"{sum(last) / 2:.3f}"
    assert "mean of 2 seeds" in report.headline[0]
    assert not any(row[0] == "mean of 3 seeds" for row in page.rows if row)


def test_the_page_says_how_it_was_executed_and_on_which_images(tmp_path):
    data = {
        "_target_": "robustdyn.data.CIFAR10",
        "root": "/somewhere/secret",
        "num_classes": 10,
        "channels": 3,
    }
    data |= {"image_size": 32, "batch_size": 128, "train_size": None, "validation_size": 0, "test_size": 500}
    data["augment"] = {"crop_padding": 4, "padding_mode": "reflect", "flip": True, "cutout": 0}
    trainer = {"trainer__precision": "bf16-mixed", "trainer__devices": 2, "trainer__strategy": "ddp"}
    how = {"execution": {"compile": "default", "channels_last": True}, "deterministic": True, **trainer}
    run = write_run(tmp_path / "run", epochs=2, measured=(), data=data | {"mixup": 0.2}, **how)
    text = build_report(run, tmp_path / "report").html.read_text()
    for words in (
        "CIFAR10: all training images, 500 test images, 10 classes of 3×32×32, batch size 128",
        "crop padding 4 (reflect), flip, mixup 0.2",
        "precision bf16-mixed, compiled (default), channels last, deterministic, devices 2, ddp",
    ):
        assert words in text, words
    assert "/somewhere" not in text.partition('id="config"')[0]


@pytest.mark.slow
def test_twenty_four_long_runs_fit_into_a_small_page(tmp_path):
    for seed in range(24):
        write_run(tmp_path / f"r{seed}", seed=seed, epochs=80, measured=())
    text = build_report(tmp_path, tmp_path / "report").html.read_text()
    assert len(text.encode()) < 3 * 2**20


# ---------------------------------------------------------------------- in a browser

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


class Shown(Page):
    """A page as a browser has made it."""

    def __init__(self, page, hash_, tmp_path):
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        address = page.resolve().as_uri() + hash_
        command = [BROWSER, *flags, f"--user-data-dir={tmp_path}", "--dump-dom", address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
        self.names, self._row = [], None
        super().__init__(done.stdout)

    def handle_starttag(self, tag, attrs):
        super().handle_starttag(tag, attrs)
        told = dict(attrs)
        if tag == "tr":
            self._row = told
        if tag == "th" and "data-value" in told and "hidden" not in self._row:
            self.names.append(told["data-value"])

    def curves(self):
        """Kinds of the curves drawn in all panels."""
        return Counter(attrs["class"].split()[1] for attrs in self.named("polyline"))


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_the_address_filters_rows_and_curves_and_sorts(report, tmp_path):
    every = Shown(report.html, "", tmp_path / "a")
    assert len(every.names) == 6
    # two runs of each method, four panels: thin ones and a mean
    assert every.curves() == {"thin": 16, "mean": 8}
    assert not any("evil" in attrs.get("src", "") for attrs in every.named("img"))

    awp = Shown(report.html, "#method=awp", tmp_path / "b")
    assert awp.names == ["method=awp seed=0", "method=awp seed=1", "method=awp seed=2"]
    assert awp.curves() == {"thin": 8, "mean": 4}
    assert [a["value"] for a in awp.named("input") if "checked" in a] == []  # a property, not the markup's
    assert "3 of 6 runs shown" in "".join(awp.words)

    chosen = "#method=awp&method=at&seed=1&seed=2&state=done&state=failed&colour=&sort=-3"
    sorted_ = Shown(report.html, chosen, tmp_path / "c")
    assert sorted_.names == ["method=at seed=2", "method=at seed=1", "method=awp seed=1"]
    assert sorted_.curves() == {"one": 8}
    heads = [attrs["aria-sort"] for attrs in sorted_.named("th") if "aria-sort" in attrs]
    assert heads == ["none"] * 3 + ["descending"] + ["none"] * 5

    single = build_report(report.html.parents[1] / "method=at,seed=0", tmp_path / "single")
    assert Shown(single.html, "", tmp_path / "e").curves() == {"one": 4}

    anchor = Shown(report.html, "#table", tmp_path / "d")  # a place on the page, no choice
    assert len(anchor.names) == 6


def test_the_multirun_file_is_read_as_hydra_writes_it(tmp_path, sweep, states):
    written = yaml.safe_load((sweep / "multirun.yaml").read_text())
    written["hydra"]["overrides"]["task"] = ["+a=[1, 2]", "name=it's"]
    folder = tmp_path / "s"
    write_run(folder / "run", epochs=2, measured=())
    (folder / "multirun.yaml").write_text(yaml.safe_dump(written))
    text = "".join(Page(build_report(folder, tmp_path / "report").html.read_text()).words)
    command = shlex.split(re.search(r"is done by: ([^\n]*)", text).group(1))
    assert command[2:4] == ["+a=[1, 2]", "name=it's"]
    (folder / "multirun.yaml").write_text("hydra: broken")
    text = "".join(Page(build_report(folder, tmp_path / "report").html.read_text()).words)
    assert "hydra.sweep.dir set to the sweep's directory" in text
