import json
import math
import warnings

import pandas as pd
import pytest

from robustdyn.errors import RecordError
from robustdyn.records import TABLES, RunRecords, combine, find_runs, read_table, reader
from robustdyn.records.labels import differences, format_value
from tests.records.synthetic import config, write_hydra, write_run, write_sweep


def setups(tmp_path, *described):
    """Write run directories with these (settings, overrides, choices), no records; return the runs found."""
    for i, (settings, overrides, choices) in enumerate(described):
        write_hydra(tmp_path / f"{i}_job", settings, overrides, choices)
    return find_runs(tmp_path)


def labels(runs):
    return [run.label for run in runs]


def test_an_absent_table_is_empty_with_its_columns(tmp_path):
    for name, spec in TABLES.items():
        frame = read_table(tmp_path, name)
        assert frame.empty
        assert tuple(frame.columns) == spec.names


def test_columns_have_the_schema_s_types(tmp_path):
    run = write_run(tmp_path / "run", epochs=6)
    spectrum = read_table(run, "spectrum")
    assert str(spectrum["epoch"].dtype) == str(spectrum["index"].dtype) == "int64"
    assert str(spectrum["hessian_eigenvalue"].dtype) == "float64"
    assert str(spectrum["stable"].dtype) == "boolean"
    assert set(read_table(run, "wci")["estimator"]) == {"gauss_newton_exact"}


def test_a_half_written_last_line_is_left_out_with_a_warning(tmp_path):
    run = write_run(tmp_path / "run", epochs=3)
    path = RunRecords(run).path("epochs")
    path.write_text(path.read_text()[:-40])
    with pytest.warns(UserWarning, match=r"epochs\.jsonl, line 3: half-written last line"):
        assert read_table(run, "epochs")["epoch"].tolist() == [0, 1]


@pytest.mark.parametrize("broken", ['{"epoch": 1, "st', "[]", '{"step": 3}', "\x00\x00"])
def test_a_broken_middle_line_names_file_and_line(tmp_path, broken):
    run = write_run(tmp_path / "run", epochs=4)
    path = RunRecords(run).path("epochs")
    lines = path.read_text().splitlines()
    lines[1] = broken
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(RecordError, match=r"epochs\.jsonl, line 2: not a record; remove the line"):
        read_table(run, "epochs")


def test_tables_that_runs_write_take_the_fast_parser(tmp_path):
    run = write_run(tmp_path / "run", epochs=6)
    written = [path for path in (run / "records").glob("*.jsonl") if path.stat().st_size]
    assert len(written) > 4
    for path in written:
        assert reader._usual_values(path, TABLES[path.stem]) is not None, path


@pytest.mark.parametrize(
    "content",
    [
        '{"epoch": 0, "lr": 1}\n{"epoch": 1, "lr": null}',
        '{"epoch": 0, "lr": 0.1}\r\n{"epoch": 1, "lr": 5e-324}\r\n',
        '{"epoch": 0}\n\n{"epoch": 1}\n',
        '{"epoch": 0}{"epoch": 1}\n\n',
        '{"epoch": 0}{"epoch": 1}\n{"epoch": 2,\n"lr": 0.1}\n',
        '{"epoch":\n0}\n',
        '{"epoch": 0, "epoch": 1}\n',
        '{"epoch": 0, "lr": "0.1"}\n{"epoch": 1, "lr": true}\n',
        '{"epoch": 0, "step": 1.0}\n',
        '{"epoch": 0, "step": 9007199254740994}\n',
        '{"epoch": 0, "lr": NaN}\n{"epoch": 1, "lr": -Infinity}\n{"epoch": 2, "lr": 1e400}\n',
        '\ufeff{"epoch": 0}\n',
        '{"lr": 0.1}\n{"epoch": 1}\n',
        '{"epoch": 0, "lr": [1]}\n',
        "\n",
    ],
)
def test_both_parsers_agree(tmp_path, monkeypatch, content):
    path = RunRecords(tmp_path).path("epochs")
    path.parent.mkdir()
    path.write_text(content, newline="")

    def outcome():
        reader.warn_once.cache_clear()
        try:
            with warnings.catch_warnings(record=True) as told:
                return read_table(tmp_path, "epochs").to_json(double_precision=15), [
                    str(w.message) for w in told
                ]
        except RecordError as error:
            return str(error)

    both = outcome()
    monkeypatch.setattr(reader, "_usual_values", lambda *_: None)
    assert outcome() == both


def test_rows_written_twice_count_once(tmp_path):
    run = write_run(tmp_path / "run", epochs=3, measured=())
    path = RunRecords(run).path("epochs")
    last = json.loads(path.read_text().splitlines()[-1])
    with path.open("a") as file:
        file.write(json.dumps(last | {"lr": 7.0}) + "\n")
    with pytest.warns(UserWarning, match="1 rows written twice"):
        frame = read_table(run, "epochs")
    assert frame["epoch"].tolist() == [0, 1, 2]
    assert frame["lr"].iloc[-1] == 7.0


def test_values_of_another_kind_and_unknown_columns(tmp_path):
    (tmp_path / "records").mkdir()
    path = tmp_path / "records" / "alignment.jsonl"
    path.write_text('{"epoch": 0, "commutator": 0.5, "later_invention": 3}\n')
    assert read_table(tmp_path, "alignment")["later_invention"].tolist() == [3]
    for value in ('"x"', "[1, 2]"):
        path.write_text(f'{{"epoch": 0, "commutator": {value}}}\n')
        with pytest.raises(RecordError, match=r"alignment\.jsonl: column commutator"):
            read_table(tmp_path, "alignment")


def test_runs_are_found_once_and_in_natural_order(tmp_path):
    for job in (10, 2, 1):
        write_hydra(tmp_path / "sweep" / f"{job}_x", config(seed=job))
    write_hydra(tmp_path / "sweep" / "1_x" / "nested", config(seed=99))  # part of run 1
    runs = find_runs([tmp_path, tmp_path / "sweep" / "2_x"])
    assert [run.path.name for run in runs] == ["1_x", "2_x", "10_x"]
    assert [run.config["seed"] for run in runs] == [1, 2, 10]


def test_a_path_without_runs_says_what_was_expected(tmp_path):
    with pytest.raises(RecordError, match=r"no run in it; a run directory holds \.hydra/config\.yaml"):
        find_runs(tmp_path)
    with pytest.raises(RecordError, match="nowhere: no such directory"):
        find_runs([tmp_path / "nowhere"])
    write_hydra(tmp_path / "a", config())
    (tmp_path / "a/.hydra/config.yaml").write_text("seed: [")
    with pytest.raises(RecordError, match=r"config\.yaml: cannot read"):
        find_runs(tmp_path)


def test_configurations_are_plain_and_hydra_s_own_interpolations_stay_text(tmp_path):
    (run,) = setups(tmp_path, (config(seed=4), ["seed=4"], {"method": "at", "hydra/launcher": "basic"}))
    assert run.config["data"]["seed"] == 4  # resolved from ${seed}
    assert run.config["trainer"]["default_root_dir"] == "${hydra:runtime.output_dir}"
    assert type(run.config) is dict
    assert type(run.config["schedule"]["milestones"]) is list
    assert run.overrides == ("seed=4",)


def test_a_single_run_is_called_after_its_directory(tmp_path):
    (run,) = setups(tmp_path, (config(), [], {}))
    assert (run.label, run.group) == ("0_job", "0_job")


def test_runs_that_differ_in_seed_only(tmp_path):
    runs = setups(tmp_path, *((config(seed=s), [f"seed={s}"], {"method": "at"}) for s in (0, 1)))
    assert labels(runs) == ["seed=0", "seed=1"]
    assert {run.group for run in runs} == {"all seeds"}


def test_a_choice_stands_for_all_it_implies(tmp_path):
    runs = setups(
        tmp_path,
        *((config(m, s), [f"method={m}", f"seed={s}"], {"method": m}) for m in ("at", "awp") for s in (0, 1)),
    )
    assert labels(runs) == ["method=at seed=0", "method=at seed=1", "method=awp seed=0", "method=awp seed=1"]
    assert [run.group for run in runs] == ["method=at", "method=at", "method=awp", "method=awp"]
    differing = differences(runs)
    assert differing["perturbation.gamma"] == [None, None, 0.01, 0.01]
    assert "data.seed" not in differing  # follows from seed
    assert "experiment_name" not in differing
    assert "data.root" not in differing


def test_choices_are_read_from_the_config_where_hydra_recorded_none(tmp_path):
    runs = setups(tmp_path, (config("at"), [], {}), (config("awp"), [], {}))
    assert labels(runs) == ["perturbation=none", "perturbation=AWP"]


def test_typed_settings_are_shown_even_if_implied(tmp_path):
    runs = setups(
        tmp_path,
        (config("at", 0), ["method=at", "seed=0"], {"method": "at"}),
        (
            config("awp", 1, perturbation__gamma=0.02),
            ["method=awp", "perturbation.gamma=0.02", "seed=1"],
            {"method": "awp"},
        ),
    )
    assert labels(runs) == ["method=at seed=0", "method=awp perturbation.gamma=0.02 seed=1"]


def test_labels_say_the_keys_that_are_typed(tmp_path):
    changed = ({"schedule__lr": 1, "optimizer__lr": v} for v in (0.1, 0.01))
    runs = setups(tmp_path, *((config(**c), [], {}) for c in changed))
    assert labels(runs) == ["optimizer.lr=0.1", "optimizer.lr=0.01"]
    runs = find_runs(
        setups(tmp_path / "b", *((config(attack__steps=s), [], {}) for s in (1, 10)))[0].path.parent
    )
    assert labels(runs) == ["attack.steps=1", "attack.steps=10"]


def test_equal_runs_carry_their_directories(tmp_path):
    runs = setups(tmp_path, (config(), [], {}), (config(), [], {}))
    assert labels(runs) == ["0_job", "1_job"]
    write_hydra(tmp_path / "deep" / "0_job", config())
    assert sorted(labels(find_runs(tmp_path))) == ["0_job", "1_job", "deep/0_job"]


def test_a_run_that_lacks_the_setting_is_still_named(tmp_path):
    runs = setups(tmp_path, (config(), [], {}), (config(optimizer__nesterov=True), [], {}))
    assert labels(runs) == ["optimizer.nesterov=none", "optimizer.nesterov=true"]


def test_values_read_like_settings():
    values = [0.0005, [30, 36], None, True, "x", 8]
    assert [format_value(v) for v in values] == ["0.0005", "[30,36]", "none", "true", "x", "8"]


def test_combine_is_the_rows_of_all_runs_with_their_settings(tmp_path):
    runs = find_runs(write_sweep(tmp_path, ("at", "awp"), (0, 1), epochs=6, measured=(0, 5)))
    frame = combine(runs, "wci")
    assert list(frame.columns[:4]) == ["run", "group", "method", "seed"]
    assert len(frame) == sum(len(read_table(run.path, "wci")) for run in runs) == 8
    assert set(frame["method"]) == {"at", "awp"}
    own = frame[frame["run"] == "method=awp seed=1"]
    assert own["wci"].tolist() == read_table(runs[3].path, "wci")["wci"].tolist()


def test_a_setting_never_hides_a_column_of_the_table(tmp_path):
    for i, value in enumerate((0.1, 0.2)):
        write_run(tmp_path / str(i), epochs=3, measured=(), lr=value)
    frame = combine(find_runs(tmp_path), "epochs")
    assert set(frame["config.lr"]) == {0.1, 0.2}
    assert set(frame["lr"]) == {0.1}


def test_runs_with_and_without_an_unknown_column_are_combined(tmp_path):
    for i in range(3):
        write_run(tmp_path / str(i), epochs=2, measured=(), seed=i)
    edited(tmp_path / "1", "epochs", lambda i: {"later_invention": i})
    path = RunRecords(tmp_path / "2").path("epochs")
    path.write_text(path.read_text() + path.read_text().splitlines()[0] + "\n")
    with pytest.warns(UserWarning, match=r"2/records/epochs\.jsonl: 1 rows written twice"):
        frame = combine(find_runs(tmp_path), "epochs")
    assert frame["seed"].tolist() == [0, 0, 1, 1, 2, 2]
    assert frame["epoch"].tolist() == [0, 1, 0, 1, 1, 0]
    assert frame["later_invention"].dropna().to_dict() == {2: 0, 3: 1}


def test_combine_of_nothing_recorded_is_empty(tmp_path):
    runs = setups(tmp_path, (config(seed=0), [], {}), (config(seed=1), [], {}))
    frame = combine(runs, "wci")
    assert frame.empty
    assert set(TABLES["wci"].names) < set(frame.columns)


def edited(run, table, change):
    """Change every row of a table, as if another program had written it."""
    path = run / "records" / f"{table}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(f"{json.dumps(row | change(i))}\n" for i, row in enumerate(rows)))
    return path


@pytest.mark.parametrize(
    "line",
    [
        '{"epoch": -5}',
        '{"epoch": 1' + 30 * "0" + "}",
        '{"epoch": true}',
        '{"epoch": 1.5}',
        '{"epoch": 2, "step": ' + 100_000 * "[" + 100_000 * "]" + "}",
        '{"epoch": 2, "note": "' + 2_000_000 * "x" + '"}',
    ],
    ids=["negative", "huge", "bool", "fraction", "nested", "long"],
)
def test_a_line_that_no_run_writes_names_file_and_line(tmp_path, line):
    path = tmp_path / "records" / "epochs.jsonl"
    path.parent.mkdir()
    path.write_text(f'{{"epoch": 0}}\n{line}\n{{"epoch": 3}}\n')
    with pytest.raises(RecordError, match=r"epochs\.jsonl, line 2: not a record"):
        read_table(tmp_path, "epochs")


def test_what_is_not_finite_is_null(tmp_path):
    run = write_run(tmp_path, epochs=4, measured=())
    path = edited(run, "epochs", lambda i: {"lr": [math.inf, -math.inf, math.nan, 0.1][i]})
    path.write_text(path.read_text().replace("-Infinity", "-1e999"))
    assert read_table(run, "epochs")["lr"].isna().tolist() == [True, True, True, False]


@pytest.mark.parametrize(("column", "value"), [("step", 1.5), ("step", 2**60)])
def test_a_column_of_another_kind_is_named(tmp_path, column, value):
    run = write_run(tmp_path, epochs=2, measured=())
    edited(run, "epochs", lambda i: {column: value})
    with pytest.raises(RecordError, match=f"column {column}: not a whole number"):
        read_table(run, "epochs")
    edited(run, "epochs", lambda i: {column: 1})
    run = write_run(tmp_path / "b", epochs=2, measured=(0, 1))
    edited(run, "wci", lambda i: {"estimator": ("a", 1)[i]})
    with pytest.raises(RecordError, match="column estimator: not text"):
        read_table(run, "wci")


def test_columns_that_the_schema_does_not_know_cannot_take_a_label_s_place(tmp_path):
    run = write_run(tmp_path, epochs=5, measured=())
    mixed = [1, "a", None, [2], {"b": 1}]
    edited(run, "epochs", lambda i: {"run": "theirs", "group": i, "note": mixed[i]})
    frame = combine(find_runs(run), "epochs")
    assert frame.columns.is_unique
    assert set(frame["run"]) == {run.name}
    assert set(frame["recorded.run"]) == {"theirs"}
    assert frame["recorded.group"].tolist() == [0, 1, 2, 3, 4]
    assert frame["note"].tolist() == ["1", "a", None, "[2]", "{'b': 1}"]
    frame.to_parquet(tmp_path / "t.parquet")


def test_a_warning_is_given_once_however_often_a_record_is_read(tmp_path):
    run = write_run(tmp_path, epochs=2, measured=())
    path = run / "records" / "epochs.jsonl"
    path.write_text(2 * path.read_text())
    with pytest.warns(UserWarning, match="2 rows written twice"):
        read_table(run, "epochs")
    with warnings.catch_warnings(action="error"):
        read_table(run, "epochs")


def test_a_file_without_an_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "LARGEST_AT_ONCE", 1 << 16)
    run = write_run(tmp_path, epochs=2, measured=())
    path = run / "records" / "epochs.jsonl"
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(RecordError, match="line 1: not a record"):
        read_table(run, "epochs")


def test_a_file_that_is_too_large_to_be_read_at_once_reads_the_same(tmp_path, monkeypatch):
    run = write_run(tmp_path, epochs=4, measured=())
    whole = read_table(run, "epochs")
    monkeypatch.setattr(reader, "LARGEST_AT_ONCE", 100)
    pd.testing.assert_frame_equal(read_table(run, "epochs"), whole)
