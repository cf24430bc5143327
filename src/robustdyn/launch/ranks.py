"""Data-parallel runs: a process for each device, started by the job that Hydra runs.

Lightning runs the command again, once for each further device. Under Hydra this composes the configuration
again: every process starts the whole sweep, a folder named after the time gets another name, and the
environment variables of the first job make the second believe that its processes were already started. Here
the process of the job starts one process for each rank, passes it the composed configuration, and waits. It
does not train itself, so that no job leaves anything behind for the next one. A rank that fails or hangs is
ended from outside.

``torch.multiprocessing.start_processes`` is no substitute. Its ``join`` blames the first process that it
finds failed, which may only have lost its connection to one that was killed. Each process runs the command's
main module again before its output can be sent to a file. And when the parent is killed its processes get
SIGINT, on which a rank that waits for another one never acts.

If srun or torchrun started the processes, each of them trains, and this module only checks that there are as
many as the configuration asks for.
"""

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
from contextlib import ExitStack, contextmanager, nullcontext
from operator import itemgetter
from pathlib import Path
from typing import Any, NoReturn, cast

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

PATIENCE = 10.0  # seconds in which the other ranks can end by themselves after one has failed
RANK = (sys.executable, "-m", "robustdyn.launch.ranks")
_POLL = 0.1  # seconds
_EXCHANGE = "ROBUSTDYN_RANK_EXCHANGE"  # the folder of the task and of the errors


class RankError(RuntimeError):
    """A rank of a data-parallel run failed; the cause holds its stack trace."""


def run_in_ranks(cfg: DictConfig, task: Callable[[DictConfig], None]) -> bool:
    """Train in one process for each device, if there are several and their processes were not started yet.

    Args:
        cfg: The composed configuration of the job that Hydra is running.
        task: The function that every process calls with it, which must be at the top level of a module.

    Returns:
        Whether processes trained. If not, the calling process must train.

    Raises:
        ConfigError: A launcher started another number of processes than the configuration asks for.
        UserError: A rank raised it.
        RankError: A rank failed in another way.
    """
    trainer: lightning.Trainer = build(
        cfg, "trainer", logger=False, enable_checkpointing=False, enable_progress_bar=False, profiler=None
    )
    wanted, started = trainer.num_devices * trainer.num_nodes, _started()
    if started in (None, wanted):
        return False
    if started == 1 and trainer.num_nodes == 1:
        # as plain values, because the other process may not know the classes of a launcher's plugin
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
    """The number of processes of this job that a launcher started; None if only Lightning can tell."""
    if dist.is_torchelastic_launched():
        return int(os.environ["WORLD_SIZE"])
    if "SLURM_STEP_NUM_TASKS" in os.environ:  # set by srun alone; a batch script has SLURM_NTASKS, too
        return int(os.environ["SLURM_STEP_NUM_TASKS"])
    if "LOCAL_RANK" in os.environ or LSFEnvironment.detect() or MPIEnvironment.detect():
        return None
    return 1


class Ranks:
    """The processes of one data-parallel job, on this machine.

    Args:
        command: The command of each process.
        message: The content of the file ``message`` in the exchange folder, for all processes.
        count: The number of processes.
        folder: Folder of ``rank1.log`` and so on, the output of all processes but the first.
    """

    def __init__(self, command: Sequence[str], message: bytes, count: int, folder: Path) -> None:
        self._command, self._message, self._count, self._folder = command, message, count, folder
        self._processes: list[subprocess.Popen[bytes]] = []

    def run(self) -> None:
        """Start the processes, wait for them, and end all of them if one fails.

        Raises:
            UserError: A process raised it.
            RankError: A process failed in another way.
        """
        with tempfile.TemporaryDirectory() as exchange, ExitStack() as stack:
            (Path(exchange) / "message").write_bytes(self._message)
            # the processes meet at this store; as it is opened here, its port is taken before they start
            store = dist.TCPStore(  # type: ignore[attr-defined]
                "127.0.0.1", 0, is_master=True, wait_for_workers=False
            )
            stack.callback(self._tidy_logs)
            try:
                with self._signals_passed_on() as ended_by:
                    for rank in range(self._count):
                        process = self._start(rank, store.port, exchange)
                        self._processes.append(stack.enter_context(process))
                    failed = self._first_failed()
                if failed is not None:
                    self._end(PATIENCE)
            finally:
                self._end(0.0)
            if failed is not None and ended_by:
                os.kill(os.getpid(), ended_by[0])  # as if this process had not caught it
            if failed is not None:
                self._raise(failed, Path(exchange))

    def _start(self, rank: int, port: int, exchange: str) -> "subprocess.Popen[bytes]":
        environment = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": self._count,
            "LOCAL_WORLD_SIZE": self._count,
            "GROUP_RANK": 0,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "TORCHELASTIC_RESTART_COUNT": 0,
            "TORCHELASTIC_RUN_ID": "robustdyn",  # tells Lightning that the ranks are set
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is open; no rank must open it
            _EXCHANGE: exchange,
        }
        with nullcontext() if rank == 0 else self._log_of(rank).open("ab") as own:
            # all ranks print nearly the same, so only the first one prints to the terminal
            return subprocess.Popen(
                self._command,
                env=os.environ | {name: str(value) for name, value in environment.items()},
                stdin=subprocess.PIPE,  # the rank reads its end if this process is gone
                stdout=own,
                stderr=own,
            )

    def _first_failed(self) -> int | None:
        """Wait for all processes, or until one fails, and return the rank of that one."""
        while True:
            codes = [process.poll() for process in self._processes]
            failed = [rank for rank, code in enumerate(codes) if code]
            if failed:  # if a signal ended one of them, the others failed because of that
                return min(failed, key=lambda rank: ((codes[rank] or 0) > 0, rank))
            if None not in codes:
                return None
            time.sleep(_POLL)

    def _end(self, patience: float) -> None:
        """Wait so many seconds for the processes to end, then kill them."""
        deadline = time.monotonic() + patience
        for process in self._processes:
            try:
                process.wait(timeout=max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _raise(self, failed: int, exchange: Path) -> NoReturn:
        """Raise the cause: an error for the user, else a process that was killed, else the earliest error."""
        told = sorted(
            (pickle.loads(path.read_bytes()) for path in exchange.glob("*.error")), key=itemgetter(0)
        )
        for _, _, error, *_ in told:
            if isinstance(error, UserError):
                raise error
        code = self._processes[failed].returncode
        where = f"rank {failed} of {self._count}"
        its_log = f"; its output is in {self._log_of(failed)}" if failed else ""
        if code < 0:
            name = signal.Signals(-code).name
            hint = " (out of memory?)" if name == "SIGKILL" else ""
            raise RankError(f"{where} was ended by {name}{hint}{its_log}")
        if not told:
            raise RankError(f"{where} ended with status {code}{its_log}")
        _, rank, error, line, trace = told[0]
        if error is not None:
            raise error
        raise RankError(f"rank {rank} of {self._count}: {line}") from _RankTraceback(trace)

    @contextmanager
    def _signals_passed_on(self) -> Iterator[list[int]]:
        """Inside, signals that would end this process go to the ranks; yields a list of those received.

        Signals with a handler, for instance of a cluster's launcher, are left alone.
        """
        received: list[int] = []

        def pass_on(number: int, frame: object) -> None:
            received.append(number)
            for process in self._processes:
                process.send_signal(number)

        mine = threading.current_thread() is threading.main_thread()  # other threads cannot catch signals
        before = {
            number: signal.getsignal(number)
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
            if mine and signal.getsignal(number) in (signal.SIG_DFL, terminate)
        }
        try:
            for number in before:
                signal.signal(number, pass_on)
            yield received
        except KeyboardInterrupt:
            self._end(PATIENCE)  # the terminal has also interrupted the ranks
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
    """Shows the stack trace of another process above the error that it caused."""

    def __str__(self) -> str:
        return f'\n"""\n{self.args[0]}"""'


class SynchronizeBatchNorm(TorchSyncBatchNorm):
    """Lightning's plugin, extended to CPUs."""

    def apply(self, model: nn.Module) -> nn.Module:
        """Synchronise the BatchNorm layers of ``model`` over all ranks."""
        if _on_gpu(model):
            return super().apply(model)
        synchronize(model)
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """Return to layers that work in one process."""
        if _on_gpu(model):
            return super().revert(model)
        desynchronize(model)
        return model


def _on_gpu(model: nn.Module) -> bool:
    assert isinstance(model, lightning.LightningModule)
    return model.trainer.strategy.root_device.type == "cuda"


def batchnorm_plugins(cfg: DictConfig) -> list[SynchronizeBatchNorm]:
    """The plugin that ``trainer.sync_batchnorm`` asks for; it has no effect in a run on one device."""
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
    """Train as one rank, with the configuration that the parent process has written."""
    exchange = Path(os.environ[_EXCHANGE])
    try:
        threading.Thread(target=_end_with_parent, daemon=True).start()
        task, cfg, hydra = pickle.loads((exchange / "message").read_bytes())
        setup_globals()
        HydraConfig.instance().set_config(_whole(cfg, hydra["hydra"]))
        _configure_logging()
        task(cfg)
    except BaseException as error:
        rank = int(os.environ["RANK"])
        # the parent raises these again; errors of other classes may not survive pickling
        itself = error if isinstance(error, UserError | SystemExit) else None
        trace = "".join(traceback.format_exception(error))
        report = pickle.dumps((time.time(), rank, itself, f"{type(error).__name__}: {error}", trace))
        unfinished = exchange / f"{rank}.unfinished"
        unfinished.write_bytes(report)
        unfinished.rename(exchange / f"{rank}.error")
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # at once: a normal exit would wait for ranks that wait for this one


def _whole(cfg: DictConfig, hydra: Mapping[str, Any]) -> DictConfig:
    """The configuration of the run together with Hydra's, which refers to it and has types."""
    typed = OmegaConf.structured(HydraConf)
    OmegaConf.set_struct(typed, False)  # configuration groups add keys that the classes do not have
    settings: Any = OmegaConf.to_container(cfg, resolve=False)
    return OmegaConf.create({**settings, "hydra": OmegaConf.merge(typed, hydra)})


def _end_with_parent() -> None:
    """Kill this rank when its parent is gone: it must not write any more, as the run may be started again."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGKILL)


def _configure_logging() -> None:
    """Configure logging as Hydra does for a job; ranks other than the first log only warnings."""
    if int(os.environ["RANK"]) == 0:
        settings = HydraConfig.get()
        configure_log(cast(DictConfig, settings.job_logging), settings.verbose)
    else:
        logging.basicConfig(level=logging.WARNING)
    for chatty in ("fontTools", "matplotlib"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


if __name__ == "__main__":
    main()
