"""Runs a Hydra application: an error that the user can correct becomes one line and exit status 1."""

import logging
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from typing import NoReturn

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from robustdyn.defaults import config_dir
from robustdyn.errors import UserError
from robustdyn.launch.cluster import in_slurm
from robustdyn.launch.help import show_help
from robustdyn.launch.paths import anchor, quoted_paths
from robustdyn.launch.sweep import SweepReport, end_sweep, forget_sweep, run_in_its_directory, sweeping
from robustdyn.launch.swept_groups import first_of_swept_groups
from robustdyn.records.progress import one_line
from robustdyn.run.config_keys import refuse_unread, unknown_key
from robustdyn.run.status import Terminated, speak_safely, terminable

SHORT = "ROBUSTDYN_SHORT_ERRORS"
INTERRUPTED, TERMINATED = 130, 143  # the shells' exit status after Ctrl-C and after SIGTERM


def run_app(
    task: Callable[[DictConfig], None],
    config_name: str,
    paths: Collection[str] = (),
    composed: Callable[[str, Sequence[str]], tuple[str, list[str]]] | None = None,
    check: Callable[[DictConfig], object] | None = None,
) -> None:
    """Run ``task`` under Hydra; a ``UserError`` or a composition error becomes one line and status 1.

    With ``HYDRA_FULL_ERROR=1`` every error keeps its stack trace. A failed run does not stop a sweep, which
    ends with status 1 unless all of its runs are done; see ``robustdyn.launch.sweep``. ``paths`` are the keys
    of this command that hold paths, in addition to those of all commands. ``composed`` may name another
    configuration than ``config_name``, and other arguments. ``check`` raises a ``UserError`` for settings
    that ``task`` would refuse; a sweep calls it before its first run.
    """
    speak_safely()
    show_help(config_name)
    for chatty in (
        "fontTools",
        "matplotlib",
    ):  # Hydra's handlers would print their remarks about every figure
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # argparse cannot take overrides on both sides of a flag: "a=1 -m b=2" would be refused
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda argument: argument not in ("-m", "--multirun"))
    sys.argv[1:] = quoted_paths(sys.argv[1:], paths)
    short = SHORT in os.environ or not os.environ.get("HYDRA_FULL_ERROR")
    if short:
        # Hydra then raises errors instead of printing them. The second variable tells the processes of a
        # data-parallel run, which inherit both, that the user did not ask for stack traces
        os.environ |= {"HYDRA_FULL_ERROR": "1", SHORT: "1"}
    started: list[bool] = []
    command = config_name  # composed may replace config_name

    def refuse(cfg: DictConfig) -> None:
        hydra_cfg = HydraConfig.get()
        refuse_unread(cfg, command, hydra_cfg.overrides.task, hydra_cfg.runtime.choices)

    def refuse_or_run(cfg: DictConfig) -> None:
        refuse(cfg)
        task(cfg)

    def refuse_or_check(cfg: DictConfig) -> None:
        refuse(cfg)
        if check is not None:
            check(cfg)

    SweepReport.check = refuse_or_check
    try:
        if composed is not None and {"-h", "--help", "--hydra-help"}.isdisjoint(sys.argv):
            config_name, sys.argv[1:] = composed(config_name, sys.argv[1:])
        app = hydra.main(version_base="1.3", config_path=str(config_dir()), config_name=config_name)
        # SLURM's SIGTERM is a notice; see requeue.py
        with nullcontext() if in_slurm(os.environ) else terminable(), first_of_swept_groups():
            app(_task_with_short_errors(refuse_or_run, started, short=short))()
    except (UserError, HydraException) as error:
        if isinstance(error, UserError):  # raised by the launcher, for instance for a failed job on a cluster
            end_sweep()
        if not short:
            raise
        _fail(_explain(error, config_name))
    except KeyboardInterrupt as end:
        end_sweep(report=False)
        sys.stderr.write("interrupted\n")
        sys.exit(TERMINATED if isinstance(end, Terminated) else INTERRUPTED)
    except Exception as error:
        if isinstance(error, OSError) and short and not started and not sweeping():
            _fail(f"cannot make the run's folder: {error}; choose another hydra.run.dir, or hydra.sweep.dir")
        if short and str(error).startswith("Config group override must be"):  # Hydra's own check, as the next
            _fail("a group cannot be null: give it one of its options, which --help lists")
        if short and str(error).startswith("Only one of --run"):
            _fail(f"{error}: for --cfg leave out -m, and give every setting one value")
        # for instance a worker of the launcher was killed; the results of the other runs are kept
        if not sweeping():
            raise
        end_sweep()
        if not short:
            raise
        _fail(f"the sweep ended early: {one_line(error)}")
    finally:
        forget_sweep()
        if short:
            del os.environ["HYDRA_FULL_ERROR"], os.environ[SHORT]


def _task_with_short_errors(
    task: Callable[[DictConfig], None], started: list[bool], *, short: bool
) -> Callable[[DictConfig], float | None]:
    def run(cfg: DictConfig) -> float | None:
        started.append(True)
        hydra_cfg = HydraConfig.get()
        anchor(cfg, hydra_cfg.runtime.cwd)
        try:
            if hydra_cfg.output_subdir is None:  # writes no run directory
                task(cfg)
                return None
            return run_in_its_directory(task, cfg)
        except UserError as error:
            if not short or hydra_cfg.mode == RunMode.MULTIRUN:
                raise
            _fail(str(error))

    return run


def _fail(message: str) -> NoReturn:
    sys.stderr.write(f"error: {message}\n")
    sys.exit(1)


def _explain(error: BaseException, config_name: str) -> str:
    text = " ".join(" ".join(str(part).split()) for part in (error, error.__cause__) if part is not None)
    text = text.partition(" Config search path")[0]
    if isinstance(error, OverrideParseException):
        return f"cannot read the override {error.override}: {text}"
    unknown = re.search(r"Could not override '([^']+)'", text)
    if unknown is None or " not in " not in text:
        return text
    key = unknown.group(1)
    name = key.removeprefix("hydra.launcher.")
    if name in OmegaConf.load(config_dir() / "hydra" / "launcher" / "slurm.yaml"):
        return f"{key} is a setting of another launcher: give hydra/launcher=slurm hydra.launcher.{name}=..."
    if "not in struct" not in text:
        return text
    return unknown_key(key, set(_all_keys(config_name)))


def _all_keys(config_name: str) -> Iterator[str]:
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = hydra.compose(config_name)

    def walk(node: object, prefix: str) -> Iterator[str]:
        if isinstance(node, dict):
            for name, child in node.items():
                yield f"{prefix}{name}"
                yield from walk(child, f"{prefix}{name}.")

    yield from walk(OmegaConf.to_container(cfg, resolve=False), "")
