"""``findings.md``: the question, the answer in one to three sentences, the tables, the figures."""

import importlib
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from robustdyn.studies.shared import one_factor
from robustdyn.studies.shared.study import ASSUMED, findings_page, load

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
STUDIES = (
    "awp_strength",
    "bound",
    "correlation",
    "dynamics",
    "measures",
    "methods",
    "precision",
    "published",
    "regimes",
    "schedules",
    "wci_gap",
    "wci_rate",
)
STORED = [
    *((name, "results") for name in STUDIES),
    ("forks", "results/digits"),
    ("schedules", "results/bound"),
    ("forks", "results/images"),
    *(
        ("ground_truth", f"results/{part}")
        for part in (
            "after_the_decay",
            "further",
            "images_after_the_decay",
            "replicas",
            "seeds",
            "to_step_1000",
        )
    ),
]


def begins_with(page, name, findings):
    assert 1 <= len(findings) <= 3
    return page.startswith(f"{load(name).question}\n\n{' '.join(findings)}\n\n`tables/")


@pytest.mark.parametrize(("name", "folder"), STORED)
def test_the_stored_findings_are_those_of_the_stored_tables(name, folder):
    results = EXPERIMENTS / name / folder
    page = (results / "findings.md").read_text(encoding="utf-8")
    tables = {
        stem: pd.read_csv(results / "tables" / f"{stem}.csv") for stem in re.findall(r"tables/(\w+)", page)
    }
    findings = importlib.import_module(f"robustdyn.studies.{name}").findings_of(tables)
    assert begins_with(page, name, findings)


@pytest.mark.parametrize("name", ["decay_timing", "rate_and_decay", "regularizers"])
def test_the_stored_findings_of_one_factor_are_those_of_the_stored_runs(name):
    results = EXPERIMENTS / name / "results"
    drawn = pd.read_csv(results / "figures" / "outcomes.csv")
    runs = drawn[drawn["seed"].notna()].rename(columns={"mean": "value"})
    findings = one_factor.findings_of(pd.read_csv(results / "tables" / "outcomes.csv"), runs)
    assert begins_with((results / "findings.md").read_text(encoding="utf-8"), name, findings)


def test_a_page_says_what_a_table_of_means_holds():
    means = pd.DataFrame({"mean": [1.0, 2.0], "low": [0.5, np.nan], "high": [1.5, np.nan], "seeds": [3, 1]})
    long = pd.DataFrame({"value": range(41)})
    page = findings_page("Why?", ["First.", "Second."], {"means": means, "long": long}, ["curve"])
    assert page.splitlines() == [
        "Why?",
        "",
        "First. Second.",
        "",
        "`tables/means.csv`, 2 rows: means over 1–3 seeds with Student's 95 % interval",
        "",
        "| mean | low | high | seeds |",
        "| --- | --- | --- | --- |",
        "| 1 | 0.5 | 1.5 | 3 |",
        "| 2 |  |  | 1 |",
        "",
        "`tables/long.csv`, 41 rows",
        "",
        ASSUMED,
        "",
        "![curve](figures/curve.png)",
    ]
    empty = findings_page("Why?", ["So."], {"means": means[:0]}, [])  # no run of the baseline, say
    assert empty.endswith("\n`tables/means.csv`, 0 rows\n")
    assert ASSUMED not in empty
    one_seed = findings_page("Why?", ["So."], {"means": means.assign(seeds=1)}, [])
    assert "`tables/means.csv`, 2 rows: means over 1 seed\n" in one_seed
    assert ASSUMED not in one_seed
