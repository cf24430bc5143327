"""Data-parallel runs of the real command, under Hydra, Lightning and gloo: two processes do what one does."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from tests.distributed.instruments import sitecustomize as instruments
from tests.runs import command, rows
from tests.tolerances import EXACT32, EXACT64

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # every process imports for seconds

INSTRUMENTS = Path(instruments.__file__).parent
LIMIT = 600  # seconds; alone on two cores the longest command needs forty
TRAIN = (sys.executable, "-m", "robustdyn.commands.train")
# 16 examples of a step and 7 of an epoch's last are 8 + 8 and 3 + 4, 61 to evaluate 20 + 20 and 10 + 11
SMALL = (
    "data.train_size=87",
    "data.test_size=61",
    "data.batch_size=16",
    "data.eval_batch_size=40",
    "model.width=4",
    "model.blocks=[1,1]",
    "model.strides=[1,2]",
    "attack.steps=2",
    "measure.examples=40",
    "measure.epochs=[0]",
    "measure.eigenpairs.directions=2",
    "measure.eigenpairs.tolerance=1e-6",
    "measure.measurements.alignment.randomisations=5",
    "report=false",
    "name=small",
)
BY_METHOD = "hydra.sweep.subdir=${hydra:runtime.choices.method}"


def environment(**more):
    path = [str(INSTRUMENTS), str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    known = {
        k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")
    }
    return known | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)} | more


def run(*arguments, program=TRAIN, **variables):
    return subprocess.run(
        [*program, *arguments],
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )


def weights(run_dir):
    checkpoint = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    found = {k: v for k, v in checkpoint["state_dict"].items() if k.startswith("model.")}
    return checkpoint["global_step"], found


# ---------------------------------------------------------- a sweep of methods, on two ranks and on one

METHODS = ("at", "awp", "trades")
SWEEP = (
    *SMALL,
    "method=" + ",".join(METHODS),
    "schedule=wci",
    "schedule.threshold=0.05",  # what is measured is above it
    "trainer.max_epochs=4",
    "trainer.precision=64-true",
    "regularizer.l1=1e-4",
    BY_METHOD,
)


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory):
    """The folders of the same sweep with two processes and with one, and of what was counted in it."""
    folder = tmp_path_factory.mktemp("sweeps")
    two, one, counts = folder / "two", folder / "one", folder / "counts"
    counts.mkdir()
    done = run("-m", *SWEEP, "trainer=ddp_cpu", f"hydra.sweep.dir={two}", ROBUSTDYN_TEST_COUNTS=str(counts))
    assert done.returncode == 0, done.stderr[-5000:]
    uncount = instruments.count_measured_work(counts, "alone")
    try:
        with pytest.MonkeyPatch.context() as monkeypatch:
            arguments = ("-m", *SWEEP, "trainer.accelerator=cpu", f"hydra.sweep.dir={one}")
            assert command(monkeypatch, *arguments) == 0
    finally:
        uncount()
    return two, one, counts


every_method = pytest.mark.parametrize("method", METHODS)


@every_method
def test_the_weights_are_those_of_one_process(sweeps, method):
    two, one, _ = sweeps
    (steps, found), (wanted_steps, wanted) = weights(two / method), weights(one / method)
    assert steps == wanted_steps == 24
    assert_close(found, wanted, **EXACT64)


# An epoch's losses and errors are sums in float32, a gap is the difference of two. Eigenvectors are as exact
# as the solver's residual, 1e-6, over the gap between eigenvalues; rounding decides where it ends.
OF_EIGENVECTORS = {"rel": 1e-5, "abs": 1e-9}
TOLERANCES = {
    "epochs": {"rel": EXACT32["rtol"], "abs": EXACT32["atol"]},
    "spectrum": OF_EIGENVECTORS,
    "posterior": OF_EIGENVECTORS,
    "bounds": OF_EIGENVECTORS,
    "alignment": {"rel": 1e-4, "abs": 1e-6},
    "costs": {"rel": 0.1, "abs": 3},  # products of a solver
}


@every_method
def test_every_row_is_recorded_once_and_is_that_of_one_process(sweeps, method):
    two, one, _ = sweeps
    tables = sorted(path.stem for path in (one / method / "records").glob("*.jsonl"))
    assert {"epochs", "rates", "wci", "spectrum", "posterior"} <= set(tables)
    for table in tables:
        found, wanted = rows(two / method, table), rows(one / method, table)
        assert len(found) == len(wanted), table
        for ours, theirs in zip(found, wanted, strict=True):
            assert ours.keys() == theirs.keys()
            for column, value in theirs.items():
                if column.endswith("residual"):  # what the solver left is rounding at its end
                    assert ours[column] <= 1e-5
                elif isinstance(value, float) or (table == "costs" and isinstance(value, int)):
                    wanted_value = pytest.approx(value, **TOLERANCES.get(table, {"rel": 1e-10, "abs": 1e-12}))
                    assert ours[column] == wanted_value, (table, column)
                else:
                    assert ours[column] == value, (table, column)


def test_the_rate_follows_the_measurement(sweeps):
    """Without this the sweep would not show that a measured rule is the same on two ranks."""
    rates = [row["lr"] for row in rows(sweeps[0] / "at", "rates")]
    assert len(rates) == 3
    assert rates[1] < 0.01


@every_method
def test_each_rank_does_half_of_the_measuring(sweeps, method):
    counts = sweeps[2]
    alone, *ranks = (
        json.loads((counts / f"{method}_rank{rank}.json").read_text()) for rank in ("alone", 0, 1)
    )
    # and the check that a network is piecewise linear, on two examples of each rank, and one or two of the
    # solver's products more or less, of thirty: where it stops is rounding
    assert [work / alone for work in ranks] == pytest.approx([0.5, 0.5], rel=0.06)
    assert ranks[0] == pytest.approx(ranks[1], rel=0.01)


@every_method
def test_both_ranks_end_with_the_same_weights(sweeps, method):
    digests = [(sweeps[2] / f"{method}_rank{rank}.weights").read_text() for rank in (0, 1)]
    assert digests[0] == digests[1]


def test_no_rank_has_a_folder_of_its_own(sweeps):
    two, one, _ = sweeps
    for method in METHODS:
        found, wanted = (
            {p.relative_to(sweep / method) for p in (sweep / method).rglob("*")} for sweep in (two, one)
        )
        assert found - wanted <= {Path("rank1.log")}
        assert not wanted - found
        settings = (two / method / ".hydra" / "overrides.yaml").read_text()
        assert "trainer=ddp_cpu" in settings
        assert f"method={method}" in settings
    assert {p.name for p in two.iterdir()} == {p.name for p in one.iterdir()}


# ---------------------------------------------------------------------- killed, and started again

RESUMED = (
    *SMALL,
    "trainer=ddp_cpu",
    "trainer.sync_batchnorm=false",  # statistics differ between ranks: those of the first one are saved
    "trainer.max_epochs=4",
    "averaging=ema",
    "averaging.decay=0.9",
    "logger=csv",
)


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid):
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def until(condition, seconds):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_a_killed_run_leaves_no_rank_behind_and_goes_on(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(*RESUMED, f"hydra.run.dir={whole}").returncode == 0
    again = [*TRAIN, *RESUMED, f"hydra.run.dir={killed}"]
    process = subprocess.Popen(again, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        last = killed / "checkpoints" / "last.ckpt"
        assert until(last.exists, LIMIT)
        ranks = children(process.pid)
        assert len(ranks) == 2
    finally:
        process.kill()
        process.wait()
    assert until(lambda: not any(map(alive, ranks)), 20)
    assert len(rows(killed, "epochs")) < 4
    assert run(*RESUMED, f"hydra.run.dir={killed}").returncode == 0
    for table in ("epochs", "rates", "wci", "spectrum", "posterior"):
        assert rows(killed, table) == rows(whole, table)
    (steps, found), (wanted_steps, wanted) = weights(killed), weights(whole)
    assert steps == wanted_steps == 24
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert [p.name for p in (whole / "csv").iterdir()].count("metrics.csv") == 1


# ---------------------------------------------------------------------- what goes wrong


def test_a_failing_rank_ends_its_run_with_one_message_and_the_sweep_goes_on(tmp_path):
    arguments = (
        *SMALL,
        "trainer=ddp_cpu",
        "trainer.max_epochs=1",
        "measure=none",
        f"hydra.sweep.dir={tmp_path}",
    )
    arguments = [a for a in arguments if not a.startswith("measure.")]
    done = run("-m", "seed=3,4", *arguments, "hydra.sweep.subdir=${seed}", ROBUSTDYN_TEST_FAIL="1:3")
    assert done.returncode != 0
    assert "rank 1 of 2: ArithmeticError: broken on purpose" in done.stderr
    assert len(rows(tmp_path / "4", "epochs")) == 1  # the job after it
    assert "onnection" not in done.stderr  # of the rank that lost the other one


def test_what_a_user_can_mend_is_said_once(tmp_path):
    arguments = ("data=cifar10", f"data.root={tmp_path / 'nothing'}", "data.download=false")
    done = run(*arguments, "trainer=ddp_cpu", f"hydra.run.dir={tmp_path / 'run'}")
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if str(tmp_path / "nothing") in line]
    assert len(errors) == 1
    assert errors[0].startswith("error: ")


# ---------------------------------------------------------------------- other ways to start


def test_torchrun_starts_the_ranks_of_one_wandb_run(tmp_path):
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m")
    arguments = [a for a in SMALL if not a.startswith("measure.")]
    arguments += ["measure=none", "trainer=ddp_cpu", "trainer.max_epochs=1", f"hydra.run.dir={tmp_path}"]
    done = run("robustdyn.commands.train", *arguments, "logger=wandb_offline", program=torchrun)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [row["epoch"] for row in rows(tmp_path, "epochs")] == [0]
    assert json.loads((tmp_path / "environment.json").read_text())["devices"] == 2
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 1


@pytest.mark.skipif(
    importlib.util.find_spec("hydra_plugins.hydra_joblib_launcher") is None, reason="no joblib launcher here"
)
def test_runs_beside_each_other(tmp_path):
    """Two jobs at a time, each on two ranks: each pair meets at a port of its own."""
    arguments = [a for a in SMALL if not a.startswith("measure.")]
    arguments += ["measure=none", "trainer=ddp_cpu", "trainer.max_epochs=1", f"hydra.sweep.dir={tmp_path}"]
    launcher = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    done = run("-m", "seed=0,1", *launcher, *arguments, "hydra.sweep.subdir=${seed}")
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (rows(tmp_path / seed, "epochs") for seed in "01")
    assert len(first) == len(second) == 1
    assert first != second
