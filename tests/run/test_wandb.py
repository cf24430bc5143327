"""What wandb shows is what the records say: the real library, without a network."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import wandb
import yaml
from omegaconf import OmegaConf

from robustdyn.records import TABLES, RunRecords
from robustdyn.run.publishing import Publisher
from robustdyn.run.wandb_run import WandbRecords
from tests.run.published import FIRST_RANK, STEPS, recorded, train, warnings_in, write_epoch, write_posterior
from tests.run.wandb_server import RunFile, WandbServer, numbers
from tests.runs import PIXEL, TINY, command, compose


@pytest.fixture(autouse=True)
def alone(tmp_path_factory, monkeypatch):
    """No login, no settings of the machine's user, nothing left running."""
    for name in [name for name in os.environ if name.startswith(("WANDB", "XDG"))]:
        monkeypatch.delenv(name)
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nothing leaves this machine
    yield home
    assert not services()
    assert wandb.run is None
    assert [name for name in os.environ if name.startswith("WANDB_") and "DIR" in name] == []


def services():
    """Process ids of wandb's services that this process started."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            _, name, state, parent = status.read_text().replace("(", "").replace(")", "").split()[:4]
        except (OSError, ValueError):
            continue
        if parent == str(os.getpid()) and name.startswith("wandb") and state != "Z":
            found.append(int(status.parent.name))
    return found


def logger_for(run_dir, **settings):
    cfg = {
        "directory": str(run_dir), "project": "p", "entity": None, "name": "n", "group": "g",
        "tags": ["data=digits"], "job_type": "train", "offline": False, "init_timeout": 20.0,
        "finish_timeout": 20.0, "figures": True, "checkpoints": "none",
        "settings": {"x_disable_stats": True, "x_disable_meta": True},
    }  # fmt: skip
    return WandbRecords(**(cfg | settings))


def run_file(run_dir):
    (path,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    return RunFile(path)


def picture(folder):
    path = folder / "robust_loss.png"
    path.write_bytes(PIXEL)
    return path


# offline


def test_every_number_of_every_table_is_in_the_offline_file(tmp_path, capfd):
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    for name in ("best_on_test", "last"):
        (checkpoints / f"{name}.ckpt").write_text(name)
    train(
        logger_for(tmp_path, offline=True, checkpoints="best"),
        tmp_path,
        range(3),
        figures=[picture(tmp_path), tmp_path / "robust_loss.pdf"],
    )
    file = run_file(tmp_path)
    tables = {name.partition("/")[0] for _, name in recorded(tmp_path)} - {"epoch"}
    assert tables == set(TABLES) - {"catoni", "curvature_cells", "density", "posterior"}
    logged = {key: value for key, value in file.values().items() if key[0] <= 3 * STEPS}
    assert logged == recorded(tmp_path)

    # axes, and summaries that are numbers, as a sweep needs them
    for _, name in logged:
        metric = file.metrics[name]
        axis = {"epoch": "", "rates/step": "", "rates/lr": "rates/step"}.get(name, "epoch")
        assert metric.step_metric == axis, name
    assert file.summary["min/epochs/test_robust_loss"] == 1.0
    assert file.summary["epochs/test_robust_loss"] == 2.0
    assert file.summary["final/test_robust_loss"] == 2.0
    assert file.summary["min_test_robust_loss/epoch"] == 1
    assert file.summary["rates/lr"] == pytest.approx(0.1 / 3)

    # configuration and place
    assert file.config["attack"] == {"eps": 8}
    assert file.config["seed"] == 3
    run = file.run
    assert (run.project, run.display_name, run.run_group, run.job_type) == ("p", "n", "g", "train")
    assert list(run.tags) == ["data=digits"]

    # spectra, tables, figures, checkpoints
    histogram = file.history[1]["histograms/hessian_eigenvalue"]
    assert histogram["_type"] == "histogram"
    assert sum(histogram["values"]) == 2
    density = file.history[1]["histograms/density_noise"]
    mass = sum(row["mass"] for row in map(json.loads, (tmp_path / "records" / "density.jsonl").open())
               if row["epoch"] == 0 and row["kind"] == "noise")  # fmt: skip
    assert sum(density["values"]) == pytest.approx(mass, rel=1e-6)  # wandb rounds
    media = {name: value for row in file.history[-2:] for name, value in row.items() if "/" in name}
    assert set(media) == {
        "tables/spectrum", "tables/layers", "tables/density", "tables/posterior", "figures/robust_loss",
    }  # fmt: skip
    table = json.loads(
        (next(tmp_path.glob("wandb/offline*/files")) / media["tables/spectrum"]["path"]).read_text()
    )
    assert [row[table["columns"].index("index")] for row in table["data"]] == [0, 1] * 3
    (artifact,) = (a for a in file.artifacts if a.type == "model")
    assert [content.path for content in artifact.manifest.contents] == ["best_on_test.ckpt"]
    assert "best_on_test" in artifact.aliases

    output = capfd.readouterr()
    folder = next(tmp_path.glob("wandb/offline-run-*"))
    assert output.err == f"wandb: offline, to upload: wandb sync {folder}\n"
    assert output.out == ""


def test_nothing_is_written_elsewhere(tmp_path, alone, monkeypatch):
    elsewhere, run_dir = tmp_path / "elsewhere", tmp_path / "run"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    train(logger_for(run_dir, offline=True), run_dir, range(1))
    assert list(elsewhere.iterdir()) == []
    assert list(alone.iterdir()) == []


def test_a_resumed_offline_run_leaves_one_whole_file(tmp_path):
    train(logger_for(tmp_path, offline=True), tmp_path, range(3), end=False)
    first = run_file(tmp_path).run.run_id
    RunRecords(tmp_path).truncate(2)  # the last checkpoint is one epoch behind
    train(logger_for(tmp_path, offline=True), tmp_path, range(2, 4))
    file = run_file(tmp_path)
    assert file.run.run_id == first
    assert not file.run.resume  # or the server would append it to what it has
    values = file.values()
    assert {key: value for key, value in values.items() if key[0] <= 4 * STEPS} == recorded(tmp_path)


@pytest.mark.slow  # starts wandb's service
def test_what_modules_log_themselves_hides_no_record(tmp_path):
    logger = logger_for(tmp_path, offline=True)

    def log_much():
        for step in range(20 * STEPS):
            logger.log_metrics({"own": step}, step=step)

    train(logger, tmp_path, range(3), between=log_much)
    values = run_file(tmp_path).values()
    for (_, name), value in recorded(tmp_path).items():
        assert value in [v for (_, other), v in values.items() if other == name], name


# online


@pytest.fixture
def server(monkeypatch):
    server = WandbServer()
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    yield server
    server.stop()


def test_a_resumed_run_goes_on_under_its_id_and_doubles_no_row(tmp_path, server, capfd):
    train(logger_for(tmp_path), tmp_path, range(3), end=False)
    (run,) = server.runs.values()
    assert run["exit"] == 1
    RunRecords(tmp_path).truncate(2)
    train(logger_for(tmp_path), tmp_path, range(2, 5))
    (run,) = server.runs.values()
    assert (run["exit"], run["resumed"]) == (0, 1)
    values = numbers(run["history"])
    assert {key: value for key, value in values.items() if key[0] <= 5 * STEPS} == recorded(tmp_path)
    assert run["summary"]["epochs/test_robust_loss"] == 4.0
    assert run["summary"]["min/epochs/test_robust_loss"] == 1.0  # of epoch 1, before this session
    (identifier,) = server.runs
    lines = capfd.readouterr().err.splitlines()
    assert lines == [f"wandb: {server.url}/me/p/runs/{identifier}"] * 2
    assert not list(tmp_path.glob("wandb/offline*"))


def test_rows_that_the_server_never_got_are_sent_when_the_run_goes_on(tmp_path, server):
    train(logger_for(tmp_path, offline=True), tmp_path, range(2), end=False)
    assert not server.runs
    train(logger_for(tmp_path), tmp_path, range(2, 3))
    (run,) = server.runs.values()
    values = numbers(run["history"])
    assert {key: value for key, value in values.items() if key[0] <= 3 * STEPS} == recorded(tmp_path)
    assert not list(tmp_path.glob("wandb/offline*"))  # it would overwrite the longer run


@pytest.mark.slow  # starts wandb's service
def test_what_a_killed_process_left_open_is_completed(tmp_path, server):
    train(logger_for(tmp_path), tmp_path, range(2), end=False)
    write_epoch(RunRecords(tmp_path), 2)
    write_posterior(RunRecords(tmp_path), 3)
    for _ in range(2):  # the second time there is nothing to do
        logger = logger_for(tmp_path)
        _ = logger.experiment
        with Publisher([logger], tmp_path, {}) as publisher:
            publisher.setup(FIRST_RANK, None, "fit")  # training finds that it has ended
    (run,) = server.runs.values()
    assert run["exit"] == 0
    assert [name for row in run["history"] for name in row].count("tables/posterior") == 1
    values = numbers(run["history"])
    assert {key: value for key, value in values.items() if key[0] <= 3 * STEPS} == recorded(tmp_path)


@pytest.mark.slow  # a process of its own
def test_uploading_the_offline_file_later_gives_the_whole_run_once(tmp_path, server):
    train(logger_for(tmp_path), tmp_path, range(2), end=False)  # online
    train(logger_for(tmp_path, offline=True), tmp_path, range(2, 3))  # then without a connection
    folder = next(tmp_path.glob("wandb/offline-run-*"))
    environment = os.environ | {"WANDB_CACHE_DIR": str(tmp_path / "cache")}
    subprocess.run(
        [sys.executable, "-m", "wandb", "sync", str(folder)],
        check=True, capture_output=True, env=environment, cwd=tmp_path, timeout=60,
    )  # fmt: skip
    (run,) = server.runs.values()
    values = numbers(run["history"])
    assert {key: value for key, value in values.items() if key[0] <= 3 * STEPS} == recorded(tmp_path)


# whatever wandb does, the run continues


def test_without_a_login_nobody_is_asked(tmp_path, monkeypatch, caplog):
    terminal = SimpleNamespace(isatty=lambda: True, readline=lambda: pytest.fail("asked on the terminal"))
    monkeypatch.setattr(sys, "stdin", terminal)
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked on the terminal"))
    train(logger_for(tmp_path), tmp_path, range(1))
    (warning,) = warnings_in(caplog)
    assert "no login" in warning
    assert "offline" in warning
    assert (STEPS, "wci/wci") in run_file(tmp_path).values()


@pytest.mark.parametrize(
    "answers",
    [
        pytest.param(False, id="refuses"),
        pytest.param(None, id="never answers", marks=pytest.mark.slow),
    ],
)
def test_without_a_connection_the_run_goes_on_offline(tmp_path, monkeypatch, caplog, answers):
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        if answers is None:
            port.listen(20)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        train(logger_for(tmp_path, init_timeout=1.5), tmp_path, range(2))
    (warning,) = warnings_in(caplog)
    assert warning.endswith("the run continues, offline")
    assert "\n" not in warning
    assert not list(tmp_path.glob("wandb/run-*"))
    values = run_file(tmp_path).values()
    assert {key: value for key, value in values.items() if key[0] <= 2 * STEPS} == recorded(tmp_path)


def test_a_connection_lost_before_the_end_leaves_the_whole_run_offline(tmp_path, server, caplog):
    train(logger_for(tmp_path, finish_timeout=1.0), tmp_path, range(3), between=server.stop, end=False)
    (warning,) = warnings_in(caplog)
    assert "offline" in warning
    values = run_file(tmp_path).values()
    assert {key: value for key, value in values.items() if key[0] <= 3 * STEPS} == recorded(tmp_path)


@pytest.mark.parametrize("offline", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_service_that_dies_does_not_end_the_run(tmp_path, server, caplog, offline):
    logger = logger_for(tmp_path, offline=offline)

    def kill_once():
        if not warnings_in(caplog):
            for pid in services():
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.2)
            logger.log_metrics({"own": 1.0}, step=1)  # a module's: training itself calls this

    train(logger, tmp_path, range(3), between=kill_once)
    (warning,) = warnings_in(caplog)
    if offline:
        assert "records are complete" in warning
    else:
        values = run_file(tmp_path).values()
        assert {key: value for key, value in values.items() if key[0] <= 3 * STEPS} == recorded(tmp_path)


def test_wandb_can_be_switched_off_from_outside(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    train(logger_for(tmp_path), tmp_path, range(1))
    assert not warnings_in(caplog)
    assert not list(tmp_path.glob("wandb/*run-*"))


# sweeps and ranks


def test_only_the_first_rank_publishes(tmp_path):
    publisher = Publisher([logger_for(tmp_path, offline=True)], tmp_path, {})
    other = SimpleNamespace(is_global_zero=False)
    with publisher:
        publisher.setup(other, None, "fit")
        write_epoch(RunRecords(tmp_path), 0)
        publisher.on_train_start(other, None)
        publisher.on_train_epoch_end(other, None)
        publisher.on_train_end(other, None)
    assert not (tmp_path / "wandb").exists()


@pytest.mark.slow  # starts wandb's service
def test_an_agents_run_has_the_agents_id(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    monkeypatch.setenv("WANDB_RUN_ID", "given1")
    train(logger_for(tmp_path, offline=True), tmp_path, range(1))
    run = run_file(tmp_path).run
    assert (run.run_id, run.sweep_id) == ("given1", "sweep1")
    assert json.loads((tmp_path / "wandb" / "run.json").read_text()) == {"id": "given1", "complete": True}


TRACKING = Path(__file__).parents[2] / "experiments" / "tracking"


def test_the_sweep_file_drives_the_command_as_it_is():
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    sweep = yaml.safe_load((TRACKING / "sweep.yaml").read_text())
    chosen = {
        name: {
            "value": spec.get(
                "value", spec.get("values", [spec.get("min")])[0] if "value" not in spec else None
            )
        }
        for name, spec in sweep["parameters"].items()
    }
    arguments = []
    for word in create_sweep_command(sweep["command"]):
        if word == "${args_no_hyphens}":
            arguments += create_sweep_command_args({"args": chosen})["args_no_hyphens"]
        elif word == "${program}":
            assert sweep["program"] == "robustdyn-train"
        elif word != "${env}":
            arguments.append(word)
    assert arguments[0].startswith("hydra.run.dir=")
    cfg = compose(*(argument for argument in arguments if not argument.startswith("hydra.")))
    assert cfg.logger.wandb.project == "robustdyn"
    for name, spec in chosen.items():
        if name not in ("logger", "data", "method"):
            assert OmegaConf.select(cfg, name) == spec["value"]
    # what the search and the early termination compare is logged after every epoch if images are held out
    assert sweep["metric"] == {"name": "epochs/validation_robust_error", "goal": "minimize"}
    assert "validation_robust_error" in TABLES["epochs"].names
    assert cfg.data.validation_size > 0
    assert sweep["early_terminate"]["min_iter"] < cfg.trainer.max_epochs


def test_the_dashboard_shows_curves_that_exist(tmp_path, monkeypatch, capsys):
    pytest.importorskip("wandb_workspaces")
    monkeypatch.syspath_prepend(TRACKING)
    import dashboard

    write_epoch(RunRecords(tmp_path), 0)
    logged = {name for _, name in recorded(tmp_path)}
    for panel in (panel for content in dashboard.SECTIONS.values() for panel in content):
        assert panel.x in logged
        for curve in panel.curves:
            assert any(name.startswith(f"{curve}/") for name in logged) if panel.family else curve in logged
    # the model is what saving would send
    sent = dashboard.workspace("me", "robustdyn")._to_model().model_dump(by_alias=True)
    sections = sent["spec"]["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections] == [*dashboard.SECTIONS, "Figures"]
    assert sections[0]["panels"][0]["config"]["metrics"] == [
        "epochs/train_robust_loss",
        "epochs/test_robust_loss",
    ]
    assert dashboard.main(["me", "--dry-run"]) == 0
    assert "wci/wci over epoch" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("checkpoints", "some", "must be none, best, last or all"),
        ("init_timeout", 0.0, "positive number of seconds"),
        ("finish_timeout", -1.0, "positive number of seconds"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, name, value, says):
    with pytest.raises(ValueError, match=says):
        logger_for(tmp_path, **{name: value})


# through the command


@pytest.mark.slow  # a sweep
def test_several_loggers_at_once_in_a_sweep_of_one_process(tmp_path, monkeypatch, capfd):
    sweep_dir = tmp_path / "sweep"
    overrides = (
        "logger=[wandb_offline,csv]", "trainer.max_epochs=1", "measure.epochs=[0]", "report=false",
        "data.validation_size=40", "logger.wandb.checkpoints=last", "model.blocks=[1]", "model.strides=[2]",
    )  # fmt: skip
    assert command(monkeypatch, *TINY, *overrides, "-m", "seed=0,1", f"hydra.sweep.dir={sweep_dir}") == 0
    jobs = sorted(path.parent for path in sweep_dir.glob("*/records"))
    assert len(jobs) == 2
    files = [run_file(job) for job in jobs]
    assert len({file.run.run_id for file in files}) == 2
    for job, file in zip(jobs, files, strict=True):
        last = max(step for step, _ in recorded(job))
        assert {key: value for key, value in file.values().items() if key[0] <= last} == recorded(job)
        assert file.run.run_group == "tiny sweep"
        assert file.run.display_name == f"tiny {job.name}"
        assert list(file.run.tags) == ["data=digits", "method=at"]
        assert (
            file.config["attack"]["eps_255"] == OmegaConf.load(job / ".hydra" / "config.yaml").attack.eps_255
        )
        assert "best_on_validation/validation_robust_error" in file.summary
        assert [a.type for a in file.artifacts].count("model") == 1
        assert (job / "csv" / "metrics.csv").exists()
    assert {file.config["seed"] for file in files} == {0, 1}
    assert capfd.readouterr().err.count("wandb: ") == 2
