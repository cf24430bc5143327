import pytest

from robustdyn.analysis import report as analysis
from robustdyn.entrypoints.report import main
from tests.records.synthetic import write_run


@pytest.fixture
def quick(monkeypatch):
    """Reports without figures: they have tests of their own."""
    monkeypatch.setattr(analysis, "FIGURES", ())


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run", epochs=25, measured=(18, 24), trainer__max_epochs=25)


def test_one_path_gets_its_report_inside(quick, run, capsys):
    assert main([str(run)]) == 0
    *numbers, last = capsys.readouterr().out.splitlines()
    assert last == f"report: {run / 'report' / 'index.html'}"
    assert (run / "report" / "index.html").is_file()
    assert [line.partition(":")[0] for line in numbers] == ["test robust loss", "robust loss gap", "WCI"]


def test_several_paths_report_here(quick, run, tmp_path, monkeypatch, capsys):
    other = write_run(tmp_path / "other", seed=1, epochs=25, measured=(), trainer__max_epochs=25)
    monkeypatch.chdir(tmp_path)
    assert main([str(run), str(other)]) == 0
    assert (tmp_path / "report" / "index.html").is_file()
    assert "mean of 2 seeds" in capsys.readouterr().out


def test_output_goes_where_it_is_told(quick, run, tmp_path):
    assert main([str(run), "--output", str(tmp_path / "elsewhere")]) == 0
    assert (tmp_path / "elsewhere" / "index.html").is_file()
    assert not (run / "report").exists()


def test_a_mistake_is_one_line_and_status_one(tmp_path, monkeypatch, capsys):
    assert main([str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: {tmp_path}: no run in it")
    assert captured.err.count("\n") == 1
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(OSError, match="no run in it"):
        main([str(tmp_path)])


def test_help_shows_examples_and_outputs(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for words in ("--output DIR", "index.html", "a sweep: runs overlaid", "tables/"):
        assert words in text
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
