"""``robustdyn-measure``: measures curvature and noise of checkpoints, of any code and any network."""

import logging
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn

from robustdyn.data import ImageDataModule, ImageTensors
from robustdyn.errors import ConfigError, RecordError
from robustdyn.launch.application import run_app
from robustdyn.launch.of_run import Typed, deferred, of_run
from robustdyn.launch.paths import load_run
from robustdyn.launch.states import announce
from robustdyn.measure import POSTERIOR_TABLES, measured_epochs, posterior_rows
from robustdyn.models import load_weights
from robustdyn.models.weight_files import read_weight_file, some
from robustdyn.records import RunRecords, read_table, summarise
from robustdyn.records.files import file_digest
from robustdyn.records.labels import flatten
from robustdyn.records.progress import RunStatus, mark_done
from robustdyn.records.run_directory import RunDirectory
from robustdyn.report.page import build_report
from robustdyn.run.checkpoint_measurement import CheckpointMeasurement
from robustdyn.run.checkpoint_series import Checkpoint, find_checkpoints
from robustdyn.run.config import COUNT, NON_NEGATIVE, SEED, SWITCH, Rule, build, check, check_rules
from robustdyn.run.measured_series import MeasuredSeries
from robustdyn.run.of_checkpoint import device_of, run_of, type_name
from robustdyn.run.status import say
from robustdyn.run.training_facts import Training

NAME = "measure"
OF_THE_RUN = ("data", "model", "attack", "measure")
RULES = {"seed": SEED, "batch_size": COUNT, "report": SWITCH}
# settings that change how the numbers are computed, and not the numbers
WITHOUT_EFFECT = (
    "measure.epochs",
    "measure.memory_mib",
    "measure.interpolation",
    "data.root",
    "data.download",
)


class _Said(logging.Handler):
    """Prints messages that the terminal does not show otherwise."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print it."""
        say(record.getMessage())


def main() -> None:
    """The ``robustdyn-measure`` command."""
    logging.getLogger("robustdyn.curvature.lanczos").handlers = [_Said()]
    sys.argv[1:] = deferred(sys.argv[1:], OF_THE_RUN)
    run_app(measure_checkpoints, NAME)


def measure_checkpoints(given: DictConfig) -> None:
    """Measure every checkpoint that was named, and record it; what is in the record already is skipped.

    Raises:
        UserError: The configuration, a checkpoint, the data or the record cannot be used.
    """
    if not given.checkpoint:
        raise ConfigError(
            "checkpoint is not given; give checkpoint=FILE, a folder of files, or a run directory"
        )
    found = find_checkpoints(str(given.checkpoint), say)
    run_dir = _run_of(found)
    typed = Typed.now(OF_THE_RUN)
    cfg, allow = of_run(NAME, found[0].path, run_dir, typed, OF_THE_RUN)
    run = None if run_dir is None else load_run(run_dir)
    _complete(cfg, typed, run_dir, run)
    check(cfg)
    check_rules(cfg, RULES)
    added_noise = float(_recorded(run_dir, "added_noise.factor", 0.0, NON_NEGATIVE))
    chosen = _chosen(cfg, found)
    averaged = cfg.measure.weights == "averaged"
    if averaged and (without := [file.path for file in chosen if not file.averaged]):
        raise ConfigError(
            f"measure.weights=averaged: {without[0]} holds no average of trained weights; choose "
            "measure.weights=trained, which takes the weights that a file has"
        )
    device = device_of(cfg.device)
    model: nn.Module = build(cfg, "model", allow=allow)
    for file in chosen:  # the last one may be read hours after the first one
        _load(model, file.path, cfg)
    data: ImageDataModule = build(cfg, "data", allow=allow)
    data.prepare_data()
    data.setup("fit")
    train = data.split("train")
    training = Training.of(chosen, cfg, run_dir, -(-len(train) // cfg.batch_size))
    optimizers = {file.epoch: training.optimizer(file) for file in chosen}
    measurement = CheckpointMeasurement(cfg, allow, data, device, added_noise=added_noise)

    output = Path(cfg.output) if cfg.output else _output(given, found, run_dir)
    settings, config = _settings(cfg, train), _config(cfg, run_dir, run, training)
    with RunStatus(output, settings):
        series = MeasuredSeries(output, settings)
        digests = {file.epoch: file_digest(file.path) for file in chosen}
        for file in chosen:
            series.check(file.epoch, file.path, digests[file.epoch])
        path = RunDirectory(output).config
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(config, encoding="utf-8")
        _say_what(cfg, chosen, series, training, len(train))
        _write_history(output, training)
        starts: Mapping[str, Tensor] = series.starts()
        for file in chosen:
            if file.epoch in series.done:
                continue
            began = time.perf_counter()
            model = build(cfg, "model", allow=allow)  # another file may have set what this one does not
            layout = _load(model, file.path, cfg)
            rows, after = measurement(
                model.to(device),
                epoch=file.epoch,
                step=training.step(file),
                optimizer=optimizers[file.epoch],
                starts=starts,
                past=partial(read_table, output),
            )
            series.add(file.epoch, digests[file.epoch], rows, starts, after)
            starts = after
            say(f"epoch {file.epoch}: {file.path.name} ({layout}), {time.perf_counter() - began:.0f} s")
        _write_posterior(output, training, cfg.measure.interpolation)
        mark_done(output)
        if cfg.report:
            announce(build_report([output], RunDirectory(output).report))
        else:
            say(f"records: {output}")


# ---------------------------------------------------------------------- the configuration


def _run_of(found: Sequence[Checkpoint]) -> Path | None:
    """The run directory that the checkpoints are of.

    Raises:
        ConfigError: They are of several runs.
    """
    runs = list(dict.fromkeys(run_of(file.path) for file in found))
    if len(runs) > 1:
        raise ConfigError(
            f"the checkpoints are of several runs ({runs[0]} and {runs[1]}); measure one after the other, as "
            "with -m checkpoint=RUN_A,RUN_B"
        )
    return runs[0]


def _complete(cfg: DictConfig, typed: Typed, run_dir: Path | None, run: DictConfig | None) -> None:
    """Add what the run says outside the sections that were taken from it, and the defaults without a run."""
    if "measure.epochs" not in typed.settings:
        cfg.measure.epochs = "all"  # a run's own were those at which it measured
    if cfg.seed is None:
        cfg.seed = 0 if run is None else run.get("seed")
    if cfg.batch_size is None:
        cfg.batch_size = cfg.data.batch_size * _recorded(run_dir, "trainer.accumulate_grad_batches", 1, COUNT)


def _recorded(run_dir: Path | None, key: str, default: Any, rule: Rule) -> Any:
    """A setting that a run recorded outside the sections that were taken from it; the default without it.

    Raises:
        RecordError: It breaks the rule; the message names the key and the file.
    """
    if run_dir is None:
        return default
    run = RunDirectory(run_dir)
    value: Any = flatten(run.setup().config).get(key)
    if value is not None and not rule.holds(value):
        raise RecordError(f"{run.config}: {key}={value} {rule.requirement}; restore it")
    return default if value is None else value


def _chosen(cfg: DictConfig, found: Sequence[Checkpoint]) -> list[Checkpoint]:
    """The checkpoints of the epochs to measure.

    Raises:
        ConfigError: There are none, or the setting cannot be read.
    """
    spec: Any = cfg.measure.epochs
    if spec == "all":
        return list(found)
    spec = OmegaConf.to_container(spec) if OmegaConf.is_config(spec) else spec
    epochs = measured_epochs(spec, max_epochs=found[-1].epoch + 1, decay_epochs=(), always_last=False)
    chosen = [file for file in found if file.epoch in epochs]
    if not chosen:
        raise ConfigError(
            f"measure.epochs={cfg.measure.epochs}: of these epochs there is no checkpoint; there are "
            f"{', '.join(str(file.epoch) for file in found)}"
        )
    return chosen


def _output(given: DictConfig, found: Sequence[Checkpoint], run_dir: Path | None) -> Path:
    path = Path(str(given.checkpoint))
    folder = found[0].path.parent
    return RunDirectory(run_dir or folder).measured / (path.stem if path.is_file() else folder.resolve().name)


def _settings(cfg: DictConfig, train: ImageTensors) -> dict[str, Any]:
    """Everything that the numbers depend on, flat."""
    names = (*OF_THE_RUN, "seed", "batch_size", "layout", "learning_rate", "momentum", "weight_decay")
    content = OmegaConf.to_container(OmegaConf.masked_copy(cfg, list(names)), resolve=True)
    assert isinstance(content, dict)
    flat = {key: value for key, value in flatten(content).items() if key not in WITHOUT_EFFECT}  # type: ignore[arg-type]
    return {**flat, "images": train.digest()}


def _config(cfg: DictConfig, run_dir: Path | None, run: DictConfig | None, training: Training) -> str:
    """The configuration that the report reads: that of the run, with what was measured.

    Raises:
        RecordError: A value in the run's configuration refers to a key that is not there.
    """
    whole = OmegaConf.create({}) if run is None else run.copy()
    OmegaConf.set_struct(whole, False)
    for name in (*OF_THE_RUN, "seed"):
        whole[name] = cfg[name]
    if run is None:
        whole.name = training.checkpoints[0].path.resolve().parent.name
        last = training.optimizer(training.checkpoints[-1])
        if last is not None:
            whole.optimizer = {"momentum": last.momentum, "weight_decay": last.weight_decay}
    try:
        return OmegaConf.to_yaml(whole, resolve=True)
    except OmegaConfBaseException as error:
        if run_dir is None:
            raise
        raise RecordError(
            f"{RunDirectory(run_dir).config}: {' '.join(str(error).split())}; restore it"
        ) from error


# ---------------------------------------------------------------------- what is measured


def _load(model: nn.Module, path: Path, cfg: DictConfig) -> str:
    """Put the weights into the network, in double precision if the file has it."""
    weights = read_weight_file(path).weights.values()
    model.to(torch.float64 if any(value.dtype == torch.float64 for value in weights) else torch.float32)
    return load_weights(model, path, layout=cfg.layout, trained=cfg.measure.weights == "trained")


def _say_what(
    cfg: DictConfig, chosen: Sequence[Checkpoint], series: MeasuredSeries, training: Training, examples: int
) -> None:
    left = [file for file in chosen if file.epoch not in series.done]
    done = f", {len(chosen) - len(left)} of them measured already" if len(left) < len(chosen) else ""
    epochs = f"epoch {chosen[0].epoch}" + (f" to {chosen[-1].epoch}" if len(chosen) > 1 else "")
    say(f"checkpoints {len(chosen)} ({epochs}){done}")
    say(f"examples    {cfg.measure.examples} of the {examples:,} training images of {type_name(cfg.data)}")
    if any(file.averaged for file in chosen):
        say(f"weights     {cfg.measure.weights}")
    if cfg.measure.inputs == "adversarial":
        attack = cfg.attack.evaluation
        say(f"attack      {attack.norm}, radius {255 * attack.eps:g}/255, {attack.steps} steps")
    last = training.optimizer(chosen[-1])
    if unknown := [file.path.name for file in chosen if training.optimizer(file) is None]:
        of = "" if len(unknown) == len(chosen) else f" for {some(unknown)}"
        say(
            f"optimiser   not known{of}, therefore no stationary laws{of and ' there'}: give "
            "learning_rate=... momentum=... weight_decay=..."
        )
    if last is not None:
        rate = f"rate {last.learning_rate:g}, momentum {last.momentum:g}, decay {last.weight_decay:g}"
        say(f"optimiser   {rate} at the last checkpoint; batches of {cfg.batch_size}")


def _write_history(output: Path, training: Training) -> None:
    """What is known of the training itself."""
    records = RunRecords(output)
    epochs, rates = training.history()
    try:
        records.replace("epochs", epochs)
        records.replace("rates", rates)
    except ValueError as error:  # the run's own records may be a stranger's
        raise ConfigError(
            f"{training.run_dir}: its records cannot be copied ({error}); restore them"
        ) from error
    records.write_summary(summarise(read_table(output, "epochs")))


def _write_posterior(output: Path, training: Training, interpolation: Any) -> None:
    """The posterior, if the rates of all steps are known."""
    last = training.optimizer(training.checkpoints[-1])
    tables = {name: read_table(output, name) for name in POSTERIOR_TABLES}
    if last is None or not last.plain or tables["spectrum"].empty:
        return
    if tables["rates"].empty:
        say(
            "the rates between the checkpoints are not known, therefore no posterior through time: give "
            "learning_rate='{0: 0.1, ...}' with every epoch from which another rate held"
        )
        return
    RunRecords(output).replace(
        "posterior",
        posterior_rows(
            tables, momentum=last.momentum, weight_decay=last.weight_decay, interpolation=interpolation
        ),
    )


if __name__ == "__main__":
    # imported by name, so that a launcher's workers find it
    from robustdyn.commands.measure import main as command

    command()
