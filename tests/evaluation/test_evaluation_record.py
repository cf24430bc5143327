import json

import pytest

from robustdyn.errors import RecordError
from robustdyn.evaluation import AutoAttackEvaluator, Ball, EvaluationRecord
from tests.evaluation.problems import SETTINGS, digits, pgd, run, unbounded
from tests.runs import rows

BALL = Ball("linf", 0.15)
TABLES = ("outcomes", "evaluation", "warnings")


def evaluators():
    return {
        "pgd": pgd(steps=3),
        "aa": AutoAttackEvaluator(attack_list=["apgd-ce", "apgd-dlr"]),
        "unbounded": unbounded(steps=2),  # too few steps, so that there is a warning
    }


def start(directory, net, **changes):
    settings = {"evaluators": evaluators(), "ball": BALL, "batch_size": 16} | changes
    return run(directory, net, digits(40), settings.pop("evaluators"), **settings)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, robust_net):
    directory = tmp_path_factory.mktemp("undisturbed")
    start(directory, robust_net)
    return directory


class Killed(Exception):
    pass


def killed_after(batches):
    """A progress callback that raises after so many batches, as if the process were killed."""
    count = 0

    def progress(name, done, total):
        nonlocal count
        count += 1
        if count == batches:
            raise Killed

    return progress


@pytest.mark.parametrize("batches", [1, 5, 11])  # in: clean, pgd, the second of aa
def test_goes_on_where_it_was_killed(batches, undisturbed, robust_net, tmp_path):
    with pytest.raises(Killed):
        start(tmp_path, robust_net, progress=killed_after(batches))
    recorded = len(rows(tmp_path, "outcomes"))
    assert 0 < recorded < len(rows(undisturbed, "outcomes"))
    done_again = []
    start(tmp_path, robust_net, progress=lambda name, done, total: done_again.append(name))
    for table in TABLES:
        assert rows(tmp_path, table) == rows(undisturbed, table), table
    assert summary(tmp_path) == summary(undisturbed)
    everything = []
    start(tmp_path / "again", robust_net, progress=lambda name, done, total: everything.append(name))
    assert done_again == everything[batches:]  # nothing recorded was computed again


def summary(directory):
    return json.loads((directory / "summary.json").read_text())


@pytest.mark.parametrize("cut", [3, 200])
def test_goes_on_behind_a_half_written_batch(cut, undisturbed, robust_net, tmp_path):
    with pytest.raises(Killed):
        start(tmp_path, robust_net, progress=killed_after(5))
    path = tmp_path / "records" / "outcomes.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    start(tmp_path, robust_net)
    for table in TABLES:
        assert rows(tmp_path, table) == rows(undisturbed, table), table


def test_a_finished_evaluation_computes_nothing_again(undisturbed, robust_net):
    files = [undisturbed / "records" / f"{table}.jsonl" for table in TABLES]
    before = [path.read_text() for path in files]
    batches = []
    result = start(undisturbed, robust_net, progress=lambda *step: batches.append(step))
    assert not batches
    assert [path.read_text() for path in files] == before  # times included
    assert result.accuracy("worst_case") == summary(undisturbed)["accuracy"]["worst_case"]


def test_more_evaluators_join_those_recorded(undisturbed, robust_net, tmp_path):
    start(tmp_path, robust_net, evaluators={"pgd": pgd(steps=3)})
    result = start(tmp_path, robust_net, evaluators={"cw": pgd(loss="margin")})
    names = [row["evaluator"] for row in rows(tmp_path, "evaluation")]
    assert names == ["clean", "pgd", "cw", "worst_case"]
    assert result.accuracy("worst_case") <= min(result.accuracy("pgd"), result.accuracy("cw"))
    first = [row for row in rows(undisturbed, "outcomes") if row["evaluator"] in ("clean", "pgd")]
    assert rows(tmp_path, "outcomes")[: len(first)] == first


def test_an_unfinished_evaluator_is_not_reported(robust_net, tmp_path):
    with pytest.raises(Killed):
        start(tmp_path, robust_net, progress=killed_after(8))  # in the middle of aa
    start(tmp_path, robust_net, evaluators={"cw": pgd(loss="margin", steps=2)})
    names = [row["evaluator"] for row in rows(tmp_path, "evaluation")]
    assert names == ["clean", "pgd", "cw", "worst_case"]


def test_other_settings_are_refused_with_the_way_out(undisturbed, robust_net):
    with pytest.raises(RecordError, match=r"model=the only one \(now another\); choose another output=DIR"):
        start(undisturbed, robust_net, settings={"model": "another"})
    with pytest.raises(RecordError, match=r"pgd was run with steps=3 \(now 4\); choose another output=DIR"):
        start(undisturbed, robust_net, evaluators={"pgd": pgd(steps=4)})


def test_two_processes_do_not_write_at_once(tmp_path):
    with (
        EvaluationRecord.open(tmp_path, SETTINGS, {}),
        pytest.raises(RecordError, match=r"running in process [0-9]+ on host "),
        EvaluationRecord.open(tmp_path, SETTINGS, {}),
    ):
        pass
    with EvaluationRecord.open(tmp_path, SETTINGS, {}):  # the lock was released
        pass


def spoil_settings(directory):
    (directory / "settings.json").write_text("{")
    return r"settings\.json: cannot be read; choose another output=DIR"


def lose_settings(directory):
    (directory / "settings.json").unlink()
    return r"settings\.json: missing beside records"


def spoil_a_line(directory):
    path = directory / "records" / "outcomes.jsonl"
    path.write_text("{\n" + path.read_text())
    return r"outcomes\.jsonl, line 1: not a record"


def lose_a_line(directory):
    path = directory / "records" / "outcomes.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:5] + lines[6:]))
    return r"outcomes\.jsonl: the rows of clean are not those of this evaluation"


@pytest.mark.parametrize("spoil", [spoil_settings, lose_settings, spoil_a_line, lose_a_line])
def test_a_spoilt_record_is_named(spoil, robust_net, tmp_path):
    start(tmp_path, robust_net, evaluators={"pgd": pgd(steps=1)})
    message = spoil(tmp_path)
    with pytest.raises(RecordError, match=message):
        start(tmp_path, robust_net, evaluators={"pgd": pgd(steps=1)})


def test_an_output_that_cannot_be_is_named(robust_net, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordError, match=r"file: cannot write \(.*\); choose another output=DIR"):
        start(tmp_path / "file", robust_net)
