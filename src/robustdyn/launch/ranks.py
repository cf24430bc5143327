"""Data-parallel runs: a process for each device, started by the job that Hydra runs.

Lightning's way is to run the command again, once for each further device. Under Hydra this composes the
configuration anew: a sweep starts again in every process, a folder named by the clock has another name, and
the variables that the first job leaves in the environment tell the second that its processes were started
already. Here the job's process starts one for every rank, hands it the composed configuration and waits. It
trains nothing itself, so that no job leaves anything behind for the next one, and a rank that fails or hangs
is ended from outside, whatever it waits for.

Where a cluster started the processes (srun, torchrun), each of them trains and this module only checks that
they are as many as the configuration says.
"""

import importlib
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

import lightning
import torch.distributed as dist
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import configure_log, setup_globals
from lightning.fabric.plugins.environments.lsf import LSFEnvironment
from lightning.fabric.plugins.environments.mpi import MPIEnvironment
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import TorchSyncBatchNorm
from omegaconf import DictConfig, OmegaConf
from torch import nn

from robustdyn.errors import ConfigError, UserError
from robustdyn.models.sync_batchnorm import desynchronize, synchronize
from robustdyn.run.config import build
from robustdyn.run.status import terminate

PATIENCE = 10.0  # seconds that the other ranks have to end by themselves, once one has failed
RANK = (sys.executable, "-m", "robustdyn.launch.ranks")
_POLL = 0.1  # seconds
_ERRORS = "ROBUSTDYN_RANK_ERRORS"  # folder for what the ranks have to report


class RankError(RuntimeError):
    """A rank of a data-parallel run failed; the cause holds its stack trace."""


def run_in_ranks(cfg: DictConfig, task: Callable[[DictConfig], None]) -> bool:
    """Train in one process for each device, if there are several and nobody started their processes yet.

    Args:
        cfg: The composed configuration; Hydra's own is that of the job that runs.
        task: What every process does with it; a function of a module, which is found there by its name.

    Returns:
        Whether that was done; if not, this process is to train.

    Raises:
        ConfigError: A launcher started another number of processes than the configuration asks for.
        UserError: What a rank raised, once.
        RankError: A rank failed otherwise.
    """
    trainer: lightning.Trainer = build(
        cfg, "trainer", logger=False, enable_checkpointing=False, enable_progress_bar=False, profiler=None
    )
    wanted, started = trainer.num_devices * trainer.num_nodes, _started()
    if started in (None, wanted):
        return False
    if started == 1 and trainer.num_nodes == 1:
        # as plain values: a launcher's own classes may not be there in the other process
        hydra = OmegaConf.to_container(HydraConfig.instance().cfg, resolve=False)
        message = pickle.dumps((task, cfg, hydra))
        Ranks(RANK, message, wanted, Path(HydraConfig.get().runtime.output_dir)).run()
        return True
    asked = f"trainer.devices={cfg.trainer.devices}"
    if trainer.num_nodes > 1:
        asked += f" and trainer.num_nodes={trainer.num_nodes}"
    if started == 1:
        raise ConfigError(
            f"{asked} need {wanted} processes, one for each device, and only one was started: submit with "
            "hydra/launcher=slurm, or start them with srun or torchrun"
        )
    raise ConfigError(
        f"{asked} {'make' if trainer.num_nodes > 1 else 'makes'} {wanted} process{'es' * (wanted > 1)}, but "
        f"{started} were started: choose as many, or start as many (hydra.launcher.tasks_per_node, srun "
        "--ntasks-per-node, torchrun --nproc-per-node)"
    )


def _started() -> int | None:
    """How many processes of this job a launcher started; None if only Lightning can tell."""
    if dist.is_torchelastic_launched():
        return int(os.environ["WORLD_SIZE"])
    if (
        "SLURM_STEP_NUM_TASKS" in os.environ
    ):  # srun's own: SLURM_NTASKS is set in a batch script's one process, too
        return int(os.environ["SLURM_STEP_NUM_TASKS"])
    if "LOCAL_RANK" in os.environ or LSFEnvironment.detect() or MPIEnvironment.detect():
        return None
    return 1


class Ranks:
    """The processes of one data-parallel job, on this machine.

    Args:
        command: Of each process; it reads the message's length, 8 bytes, and the message.
        message: What every process is told.
        count: How many processes.
        folder: Where what processes other than the first print goes, to ``rank1.log`` and so on.
    """

    def __init__(self, command: Sequence[str], message: bytes, count: int, folder: Path) -> None:
        self._command, self._message, self._count, self._folder = command, message, count, folder
        self._processes: list[subprocess.Popen[bytes]] = []

    def run(self) -> None:
        """Start them, wait for them, and end them all if one fails.

        Raises:
            UserError: What a process raised.
            RankError: A process failed otherwise.
        """
        with tempfile.TemporaryDirectory() as errors, ExitStack() as stack:
            # this process holds the store at which they meet: its port is taken before it is told to anybody
            store = dist.TCPStore(  # type: ignore[attr-defined]
                "127.0.0.1", 0, is_master=True, wait_for_workers=False
            )
            stack.callback(self._tidy_logs)
            try:
                with self._signals_passed_on() as ended_by:
                    for rank in range(self._count):
                        self._processes.append(self._start(rank, store.port, errors))
                    failed = self._first_failed()
                if failed is not None:
                    self._end(PATIENCE)
            finally:
                self._end(0.0)
            if failed is not None and ended_by:
                os.kill(os.getpid(), ended_by[0])  # as if it had not been caught
            if failed is not None:
                self._raise(failed, Path(errors))

    def _start(self, rank: int, port: int, errors: str) -> "subprocess.Popen[bytes]":
        numbers = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": self._count,
            "LOCAL_WORLD_SIZE": self._count,
            "GROUP_RANK": 0,
            "MASTER_PORT": port,
            "TORCHELASTIC_RESTART_COUNT": 0,
        }
        environment = {name: str(number) for name, number in numbers.items()} | {
            "MASTER_ADDR": "127.0.0.1",
            "TORCHELASTIC_RUN_ID": "robustdyn",  # by this Lightning knows that the ranks are set
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is there, no rank is to open it
            _ERRORS: errors,
        }
        with ExitStack() as stack:
            # what all ranks have to say the first one says; files of their own for the others
            own = None if rank == 0 else stack.enter_context(self._log_of(rank).open("ab"))
            process = subprocess.Popen(
                self._command,
                env=os.environ | environment,
                stdin=subprocess.PIPE,
                stdout=own,
                stderr=None if own is None else subprocess.STDOUT,
            )
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # it failed already, which is noticed below
            process.stdin.write(len(self._message).to_bytes(8, "big") + self._message)
            process.stdin.flush()  # and left open: its end tells the rank that this process is gone
        return process

    def _first_failed(self) -> int | None:
        """Wait until all have ended well, or one has not: which."""
        while True:
            codes = [process.poll() for process in self._processes]
            failed = [rank for rank, code in enumerate(codes) if code]
            if failed:  # one that a signal ended is what the others complain of
                return min(failed, key=lambda rank: ((codes[rank] or 0) > 0, rank))
            if None not in codes:
                return None
            time.sleep(_POLL)

    def _end(self, patience: float) -> None:
        """Let them end by themselves for so long, then kill."""
        deadline = time.monotonic() + patience
        for process in self._processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=max(0.0, deadline - time.monotonic()))
            if process.poll() is None:
                process.kill()
                process.wait()
            if process.stdin is not None:
                with suppress(BrokenPipeError):
                    process.stdin.close()

    def _raise(self, failed: int, errors: Path) -> NoReturn:
        """The error that began it: one that a user can put right, a killed process, or the earliest."""
        told = sorted(
            (json.loads(path.read_text()) for path in errors.glob("*.json")), key=lambda error: error["time"]
        )
        for error in told:
            kind = _user_error(error["type"])
            if kind is not None:
                raise kind(error["message"])
        code = self._processes[failed].returncode
        where = f"rank {failed} of {self._count}"
        its_log = f"; its output is in {self._log_of(failed)}" if failed else ""
        if code < 0:
            name = signal.Signals(-code).name
            hint = " (out of memory?)" if name == "SIGKILL" else ""
            raise RankError(f"{where} was ended by {name}{hint}{its_log}")
        if not told:
            raise RankError(f"{where} ended with status {code}{its_log}")
        first = told[0]
        if first["type"] == "SystemExit":
            raise SystemExit(int(first["message"]))
        raise RankError(
            f"rank {first['rank']} of {self._count}: {first['type'].rpartition('.')[2]}: {first['message']}"
        ) from _RankTraceback(first["traceback"])

    @contextmanager
    def _signals_passed_on(self) -> Iterator[list[int]]:
        """Inside, a signal that would end this process goes to the ranks; which came, in a list.

        One that somebody handles, such as a cluster's launcher, is left to them.
        """
        received: list[int] = []

        def pass_on(number: int, frame: object) -> None:
            received.append(number)
            for process in self._processes:
                process.send_signal(number)

        ours = (signal.SIG_DFL, terminate)
        mine = threading.current_thread() is threading.main_thread()  # elsewhere none can be caught
        before = {
            number: signal.getsignal(number)
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
            if mine and signal.getsignal(number) in ours
        }
        try:
            for number in before:
                signal.signal(number, pass_on)
            yield received
        except KeyboardInterrupt:
            self._end(PATIENCE)  # a terminal tells the ranks too
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _log_of(self, rank: int) -> Path:
        return self._folder / f"rank{rank}.log"

    def _tidy_logs(self) -> None:
        for rank in range(1, self._count):
            path = self._log_of(rank)
            if path.is_file() and path.stat().st_size == 0:
                path.unlink()


class _RankTraceback(Exception):
    """Shows the stack trace of another process above the error that it led to."""

    def __str__(self) -> str:
        return f'\n"""\n{self.args[0]}"""'


def _user_error(name: str) -> type[UserError] | None:
    """The class of this full name, if it is an error that a user can put right."""
    module, _, kind = name.rpartition(".")
    if not module.startswith("robustdyn."):
        return None
    found = getattr(importlib.import_module(module), kind, None)
    return found if isinstance(found, type) and issubclass(found, UserError) else None


class SynchronizeBatchNorm(TorchSyncBatchNorm):
    """Lightning's plugin, which works on CPUs too."""

    def apply(self, model: nn.Module) -> nn.Module:
        """``model`` with its BatchNorm layers synchronised over all ranks."""
        if _on_gpu(model):
            return super().apply(model)
        synchronize(model)
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """``model`` with layers that work in one process."""
        if _on_gpu(model):
            return super().revert(model)
        desynchronize(model)
        return model


def _on_gpu(model: nn.Module) -> bool:
    assert isinstance(model, lightning.LightningModule)
    return model.trainer.strategy.root_device.type == "cuda"


def batchnorm_plugins(cfg: DictConfig) -> list[SynchronizeBatchNorm]:
    """What ``trainer.sync_batchnorm`` asks for; without effect in a run on one device."""
    return [SynchronizeBatchNorm()] if cfg.trainer.sync_batchnorm else []


class OneRun(Callback):
    """Refuses ranks that were started with different configurations or run directories.

    Args:
        cfg: The configuration of this rank.
        run_dir: Its run directory.
    """

    def __init__(self, cfg: DictConfig, run_dir: Path) -> None:
        self._settings: Mapping[str, Any] = {
            "hydra.run.dir": str(run_dir),
            "the configuration": OmegaConf.to_yaml(cfg, resolve=True),
        }

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Compare with the first rank.

        Raises:
            ConfigError: They differ.
        """
        if trainer.world_size == 1:
            return
        others: list[Mapping[str, Any] | None] = [None] * trainer.world_size
        dist.all_gather_object(others, self._settings)
        for name, value in self._settings.items():
            if any(other is not None and other[name] != value for other in others):
                raise ConfigError(
                    f"{name} is not the same in all processes of the run; start all of them with the same "
                    "arguments, and with the run's folder as hydra.run.dir=DIR"
                )


# ---------------------------------------------------------------------- in the process of a rank


def main() -> None:
    """A rank: takes its configuration from the process that started it, and trains."""
    try:
        _train_as_told(sys.stdin.buffer)
    except BaseException as error:
        _tell(error)
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # at once: leaving in an orderly way waits for ranks that wait for this one


def _train_as_told(stdin: BinaryIO) -> None:
    task, cfg, hydra = pickle.loads(stdin.read(int.from_bytes(stdin.read(8), "big")))  # from our parent
    threading.Thread(target=_end_with_parent, daemon=True).start()
    setup_globals()
    HydraConfig.instance().set_config(_whole(cfg, hydra["hydra"]))
    _configure_logging()
    task(cfg)


def _whole(cfg: DictConfig, hydra: Mapping[str, Any]) -> DictConfig:
    """The run's configuration and Hydra's, whose values refer to it and have the types of its classes."""
    typed = OmegaConf.structured(HydraConf)
    OmegaConf.set_struct(typed, False)  # groups of defaults have keys there that are in no class
    settings: Any = OmegaConf.to_container(cfg, resolve=False)
    return OmegaConf.create({**settings, "hydra": OmegaConf.merge(typed, hydra)})


def _end_with_parent() -> None:
    """A rank whose parent is gone must not go on writing: somebody may start the run again."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGKILL)


def _configure_logging() -> None:
    """As Hydra does for a job; warnings alone from ranks other than the first, which would repeat it."""
    if int(os.environ["RANK"]) == 0:
        settings = HydraConfig.get()
        configure_log(cast(DictConfig, settings.job_logging), settings.verbose)
    else:
        logging.basicConfig(level=logging.WARNING)
    for chatty in ("fontTools", "matplotlib"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def _tell(error: BaseException) -> None:
    """Leave the error where the parent finds it."""
    kind = type(error)
    rank = int(os.environ["RANK"])
    code = error.code if isinstance(error, SystemExit) else None
    message = str(code if isinstance(code, int) else int(bool(code))) if kind is SystemExit else str(error)
    words = {
        "rank": rank,
        "time": time.time(),
        "type": kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}",
        "message": message,
        "traceback": "".join(traceback.format_exception(error)),
    }
    path = Path(os.environ[_ERRORS]) / f"{rank}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(words))
    temporary.replace(path)


if __name__ == "__main__":
    main()
