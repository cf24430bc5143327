"""Starting, watching and ending the processes of a job; small scripts stand in for the ranks."""

import json
import os
import pickle
import signal
import sys
import threading
import time

import pytest
import torch.distributed as dist

from robustdyn.commands.train import train
from robustdyn.errors import ConfigError, DataFileError
from robustdyn.launch import ranks as processes
from robustdyn.launch.ranks import OneRun, RankError, Ranks, run_in_ranks
from tests.runs import compose

RECEIVE = """
import json, os, pathlib, signal, socket, sys, time
exchange = pathlib.Path(os.environ["ROBUSTDYN_RANK_EXCHANGE"])
rank = int(os.environ["RANK"])
"""


def ranks(tmp_path, script, message=b"", count=2):
    return Ranks((sys.executable, "-S", "-c", RECEIVE + script), message, count, tmp_path)


def tell(rank, error, line="", at=0.0):
    """The line of a script in which this rank reports an error and ends."""
    report = pickle.dumps((at, rank, error, line, f"stack of {rank}"))
    return f"if rank == {rank}: (exchange / '{rank}.error').write_bytes({report!r}); sys.exit(1)\n"


def both_ended(job):
    """The job, which looks at its ranks only when all have ended."""
    look = job._first_failed

    def when_all_have_ended():
        for process in job._processes:
            process.wait()
        return look()

    job._first_failed = when_all_have_ended
    return job


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_every_rank_gets_its_numbers_and_the_whole_message(tmp_path):
    script = f"""
host = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
socket.create_connection(host, timeout=5).close()  # the store is there
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK")
numbers = [int(os.environ[name]) for name in names]
message = (exchange / "message").read_bytes()
pathlib.Path({str(tmp_path)!r}, f"{{rank}}.json").write_text(json.dumps([numbers, len(message), host[1]]))
"""
    before = dict(os.environ)
    message = pickle.dumps(bytes(300_000))
    for _ in range(2):  # the second job finds nothing of the first
        ranks(tmp_path, script, message, count=3).run()
        found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
        assert [numbers for numbers, *_ in found] == [[rank, rank, 3, 3, 0] for rank in range(3)]
        assert {length for _, length, _ in found} == {len(message)}
        assert len({port for *_, port in found}) == 1
    assert dict(os.environ) == before
    assert not list(tmp_path.glob("*.log"))  # nothing was said


def test_what_further_ranks_print_is_in_files(tmp_path, capfd):
    ranks(tmp_path, 'print("words of", rank, flush=True); print("and more", file=sys.stderr)').run()
    assert "words of 0" in capfd.readouterr().out
    assert (tmp_path / "rank1.log").read_text() == "words of 1\nand more\n"
    assert not (tmp_path / "rank0.log").exists()


def test_an_error_to_mend_is_raised_once_as_what_it_is(tmp_path):
    script = tell(0, None, "RuntimeError: the other one is gone") + tell(
        1, DataFileError("no such file"), at=1.0
    )
    with pytest.raises(DataFileError, match=r"^no such file$"):
        both_ended(ranks(tmp_path, script)).run()


def test_another_error_names_its_rank_and_shows_its_stack(tmp_path):
    script = tell(0, None, "RuntimeError: on purpose") + tell(1, None, "Broken: on purpose", at=-1.0)
    with pytest.raises(RankError, match=r"^rank 1 of 2: Broken: on purpose$") as error:
        both_ended(ranks(tmp_path, script)).run()
    assert "stack of 1" in str(error.value.__cause__)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_takes_the_hanging_one_along(tmp_path, monkeypatch, rank):
    monkeypatch.setattr(processes, "PATIENCE", 0.3)
    script = f"""
pathlib.Path({str(tmp_path)!r}, f"{{rank}}.pid").write_text(str(os.getpid()))
while rank == {rank} and not pathlib.Path({str(tmp_path)!r}, "{1 - rank}.pid").exists():
    time.sleep(0.01)
if rank == {rank}:
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(100)
"""
    began = time.monotonic()
    with pytest.raises(RankError, match=rf"rank {rank} of 2 was ended by SIGKILL \(out of memory\?\)"):
        ranks(tmp_path, script).run()
    assert time.monotonic() - began < 50  # half of what it would have slept
    for path in tmp_path.glob("*.pid"):
        assert gone(int(path.read_text()))


def test_a_killed_rank_is_the_cause_of_what_the_others_say(tmp_path):
    """The first rank's connection breaks, and it may be seen to end before the one that was killed."""
    script = tell(0, None, "RuntimeError: connection closed by peer") + "os.kill(os.getpid(), signal.SIGKILL)"
    with pytest.raises(RankError, match=r"rank 1 of 2 was ended by SIGKILL"):
        both_ended(ranks(tmp_path, script)).run()


def test_a_rank_that_ends_without_a_word(tmp_path):
    with pytest.raises(RankError, match=r"rank 1 of 2 ended with status 3; its output is in .*rank1\.log"):
        ranks(tmp_path, "print('last words', flush=True); sys.exit(3 * rank)").run()


def test_a_status_is_handed_on(tmp_path):
    with pytest.raises(SystemExit) as end:
        ranks(tmp_path, tell(0, SystemExit(75)), count=1).run()
    assert end.value.code == 75


def when_started(tmp_path, then):
    """Call ``then`` once both ranks have left their number."""

    def wait():
        while len(list(tmp_path.glob("*.ready"))) < 2:
            time.sleep(0.01)
        then()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("status", [0, 1])
def test_a_signal_goes_to_the_ranks(tmp_path, monkeypatch, status):
    script = f"""
signal.signal(signal.SIGTERM, lambda *_: sys.exit({status}))
pathlib.Path({str(tmp_path)!r}, f"{{rank}}.ready").touch()
time.sleep(100)
"""
    kill, sent = os.kill, []
    when_started(tmp_path, lambda: kill(os.getpid(), signal.SIGTERM))

    def spared(pid, number):
        if pid == os.getpid():
            sent.append(number)
        else:
            kill(pid, number)

    monkeypatch.setattr(os, "kill", spared)
    if status:  # the ranks were ended by it: so is this process, which the test keeps from it
        with pytest.raises(RankError):
            ranks(tmp_path, script).run()
    else:
        ranks(tmp_path, script).run()
    assert sent == [signal.SIGTERM] * status
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_signal_that_somebody_handles_is_theirs(tmp_path):
    received = []
    before = signal.signal(signal.SIGUSR2, lambda *_: received.append(1))
    script = f"""
pathlib.Path({str(tmp_path)!r}, f"{{rank}}.ready").touch()
time.sleep(0.5)
"""
    try:
        when_started(tmp_path, lambda: os.kill(os.getpid(), signal.SIGUSR2))
        ranks(tmp_path, script).run()
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert received == [1]


CPU = ("trainer.accelerator=cpu",)
TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "LOCAL_RANK": "0"}


@pytest.mark.parametrize(
    ("environment", "overrides"),
    [
        ({}, ()),
        ({"SLURM_STEP_NUM_TASKS": "1"}, ()),
        ({"SLURM_STEP_NUM_TASKS": "2"}, ("trainer=ddp_cpu",)),
        (TORCHRUN | {"WORLD_SIZE": "2"}, ("trainer=ddp_cpu",)),
        ({"LOCAL_RANK": "0"}, ("trainer=ddp_cpu",)),
    ],
)
def test_a_process_that_is_all_or_was_started_as_a_rank_trains(monkeypatch, environment, overrides):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert run_in_ranks(compose(*overrides, *CPU), train) is False


@pytest.mark.parametrize(
    ("environment", "overrides", "message"),
    [
        ({"SLURM_STEP_NUM_TASKS": "2"}, (), "trainer.devices=1 makes 1 process, but 2 were started"),
        (
            TORCHRUN | {"WORLD_SIZE": "3"},
            ("trainer=ddp_cpu",),
            "trainer.devices=2 makes 2 processes, but 3 were started",
        ),
        (
            {},
            ("trainer=ddp_cpu", "trainer.num_nodes=2"),
            "trainer.devices=2 and trainer.num_nodes=2 need 4 processes, one for each device, and only",
        ),
    ],
)
def test_other_numbers_are_refused(monkeypatch, environment, overrides, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        run_in_ranks(compose(*overrides, *CPU), train)


def test_ranks_of_other_runs_are_refused(tmp_path, monkeypatch):
    class Trainer:
        world_size = 2

    def gather(other):
        def all_gather_object(results, own):
            results[:] = [own, other._settings]

        monkeypatch.setattr(dist, "all_gather_object", all_gather_object)

    cfg, other = compose("name=tiny"), compose("name=tiny", "seed=1")
    first = OneRun(cfg, tmp_path / "a")
    gather(OneRun(cfg, tmp_path / "a"))
    first.setup(Trainer, None, "fit")
    gather(OneRun(cfg, tmp_path / "b"))
    with pytest.raises(ConfigError, match=r"^hydra\.run\.dir is not the same in all processes"):
        first.setup(Trainer, None, "fit")
    gather(OneRun(other, tmp_path / "a"))
    with pytest.raises(ConfigError, match=r"^the configuration is not the same"):
        first.setup(Trainer, None, "fit")
