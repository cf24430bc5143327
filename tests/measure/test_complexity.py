"""Tests the measurement of complexity measures: its rows, what it takes from others, and what it needs."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from robustdyn import Recorder, measure_model
from robustdyn.attacks import PGD
from robustdyn.complexity import MEASURES, NetworkOnExamples
from robustdyn.curvature import EmpiricalRisk
from robustdyn.measure import ComplexityMeasures, Eigenpairs, Spectrum, WeightCurvature
from robustdyn.records import read_table
from tests.runs import command, rows, tiny_but

SOME = [
    "frobenius_sum",
    "frobenius_distance",
    "margin_mean_robust",
    "margin_mean_clean",
    "wci",
    "hessian_trace",
]
ATTACK = PGD(norm="linf", eps=0.1, step_size=0.05, steps=2, random_start="none")


def problem():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    return model, torch.rand(24, 1, 4, 4, dtype=torch.float64), torch.randint(0, 3, (24,))


def values(rows):
    return {row["measure"]: row["value"] for row in rows["measures"]}


def network_of(model, inputs, targets, **settings):
    attacked = ATTACK.climb(model, inputs, targets, inputs)
    risk = EmpiricalRisk(model.eval(), attacked, targets)
    return NetworkOnExamples(
        model=model, clean=inputs, adversarial=attacked, targets=targets, risk=risk, attack=ATTACK, **settings
    )


def test_a_measure_has_one_row_an_epoch():
    model, inputs, targets = problem()
    some, more = (ComplexityMeasures(names=names) for names in (SOME, [*SOME[:2], "path_norm"]))
    found = measure_model(model, inputs, targets, attack=ATTACK, measurements={"some": some, "more": more})
    assert [row["measure"] for row in found.rows["measures"]] == [*SOME, "path_norm"]


def test_rows_are_the_measures_of_the_attacked_examples():
    model, inputs, targets = problem()
    start = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    found = measure_model(
        model,
        inputs,
        targets,
        attack=ATTACK,
        initial=start,
        measurements={"measures": ComplexityMeasures(names=SOME)},
    )
    network = network_of(model, inputs, targets, initial=start)
    for row in found.rows["measures"]:
        truth = MEASURES[row["measure"]](network)
        assert row["value"] == pytest.approx(truth.value, rel=1e-9)
        assert row["gradients"] == truth.gradients
        assert row["undefined"] is None
        if truth.standard_error is not None:
            assert row["value_se"] == pytest.approx(truth.standard_error, rel=1e-6)
    assert [row["measure"] for row in found.rows["measures"]] == SOME
    assert values(found.rows)["margin_mean_robust"] < values(found.rows)["margin_mean_clean"]
    assert values(found.rows)["frobenius_distance"] == pytest.approx(values(found.rows)["frobenius_sum"])


def test_what_another_measurement_found_is_not_computed_again():
    model, inputs, targets = problem()
    both = {"weight_curvature": WeightCurvature(), "measures": ComplexityMeasures(names=SOME)}
    found = measure_model(model, inputs, targets, measurements=both).rows
    by_name = {row["measure"]: row for row in found["measures"]}
    (index,) = found["wci"]
    assert by_name["wci"]["value"] == index["wci"]
    assert by_name["wci"]["value_se"] == index["wci_se"]
    assert by_name["hessian_trace"]["value"] == index["hessian_trace_all"]
    alone = measure_model(model, inputs, targets, measurements={"measures": ComplexityMeasures(names=SOME)})
    for row in alone.rows["measures"]:
        assert row["gradients"] == by_name[row["measure"]]["gradients"]


def test_without_the_weights_before_training_a_distance_is_null_and_says_why():
    model, inputs, targets = problem()
    found = measure_model(model, inputs, targets, measurements={"measures": ComplexityMeasures(names=SOME)})
    row = next(row for row in found.rows["measures"] if row["measure"] == "frobenius_distance")
    assert row["value"] is None
    assert row["undefined"] == "the weights before training are not known"


def test_without_an_attack_nothing_is_robust():
    model, inputs, targets = problem()
    names = ["margin_mean_clean", "margin_mean_robust", "entropy_robust", "prediction_divergence"]
    found = measure_model(model, inputs, targets, measurements={"measures": ComplexityMeasures(names=names)})
    clean, *robust = found.rows["measures"]
    assert math.isfinite(clean["value"])
    for row in robust:
        assert (row["value"], row["undefined"]) == (None, "the examples are not attacked")


def test_a_network_of_several_inputs_has_no_measures_and_says_why():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, first, second):
            return self.linear(first + second)

    inputs = (torch.rand(10, 4), torch.rand(10, 4))
    found = measure_model(
        Pair(),
        inputs,
        torch.randint(0, 3, (10,)),
        measurements={"measures": ComplexityMeasures(names=["wci"])},
    )
    (row,) = found.rows["measures"]
    assert row["value"] is None
    assert "one floating-point tensor" in row["undefined"]


def test_the_names_choose_the_measures():
    assert [m.name for m in ComplexityMeasures(names="all").measures] == list(MEASURES)
    assert ComplexityMeasures(names="without_searches").needs_initial
    assert not ComplexityMeasures(names=["wci"]).needs_initial
    with pytest.raises(ValueError, match=r"frobenius_som, which is no measure; did you mean frobenius_sum"):
        ComplexityMeasures(names=["frobenius_som"])
    with pytest.raises(ValueError, match="names is empty"):
        ComplexityMeasures(names=[])
    with pytest.raises(ValueError, match="names=some is not all"):
        ComplexityMeasures(names="some")


def test_searches_are_left_out_unless_their_value_is_known():
    model, inputs, targets = problem()
    cheap = {"measures": ComplexityMeasures(names="without_searches")}
    solved = {"spectrum": Spectrum(), **cheap}
    expected = {name for name, measure in MEASURES.items() if not measure.searches}
    assert set(values(measure_model(model, inputs, targets, measurements=cheap).rows)) == expected
    found = measure_model(
        model, inputs, targets, measurements=solved, eigenpairs=Eigenpairs(directions=2, tolerance=1e-6)
    ).rows
    assert set(values(found)) == expected | {"hessian_lambda_1"}
    assert values(found)["hessian_lambda_1"] == found["spectrum"][0]["hessian_eigenvalue"]


def test_a_recorder_compares_with_the_weights_that_it_saw_first(tmp_path):
    model, inputs, targets = problem()
    wanted = {"measures": ComplexityMeasures(names=["frobenius_distance"])}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = {name: p.detach().clone() for name, p in model.named_parameters()}

    def step(recorder):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        recorder.step(optimizer)

    def distance():
        present = dict(model.named_parameters())
        return sum(
            (present[n].detach() - first[n]).square().sum().item() for n in first if n.endswith("weight")
        )

    recorder = Recorder(model, inputs, targets, tmp_path / "run", measurements=wanted)
    step(recorder)
    recorder.measure(0)
    truth = [distance()]
    saved = recorder.state_dict()
    recorder.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    # another process continues with the weights that were reached
    resumed = Recorder(model, inputs, targets, tmp_path / "run", measurements=wanted, resume=True)
    resumed.load_state_dict(saved)
    step(resumed)
    resumed.measure(1)
    truth.append(distance())
    resumed.finish()
    found = read_table(tmp_path / "run", "measures")
    assert found["value"].tolist() == pytest.approx(truth, rel=1e-9)
    assert truth[1] > truth[0] > 0


def test_a_measure_is_computed_once_where_it_is_known():
    model, inputs, targets = problem()
    network = network_of(model, inputs, targets)
    known = MEASURES["wci"](network)
    again = MEASURES["wci"](dataclasses.replace(network, known={"wci": known}))
    assert again is known
    assert math.isfinite(known.value)


@pytest.mark.slow  # three runs
def test_a_resumed_run_compares_with_the_weights_before_training(tmp_path, monkeypatch):
    settings = (
        *tiny_but("measure.", "trainer.max_epochs"),
        "measure=measures",
        "measure.epochs=every 1",
        "measure.examples=8",
        "measure.second_attack=2",
        "measure.measurements.measures.names=[frobenius_distance]",
        *(f"measure.measurements.{name}=null" for name in ("spectrum", "alignment", "weight_curvature")),
        "report=false",
    )
    whole, halted = tmp_path / "whole", tmp_path / "halted"
    for directory, epochs in ((whole, 2), (halted, 1), (halted, 2)):
        assert (
            command(
                monkeypatch,
                *settings,
                f"trainer.max_epochs={epochs}",
                "resume=changed",
                f"hydra.run.dir={directory}",
            )
            == 0
        )
    first, second = (
        [(row["epoch"], row["value"]) for row in rows(directory, "measures")] for directory in (whole, halted)
    )
    assert first == second
    assert first[1][1] > first[0][1] > 0
