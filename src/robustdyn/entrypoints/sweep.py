"""What happens once all runs of a multirun have ended."""

from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from robustdyn.analysis.report import build_report
from robustdyn.entrypoints.report import announce


class SweepReport(Callback):
    """Builds one report over the sweep's runs, in its directory, unless ``report=false``."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Hydra's hook."""
        if config.report:
            sweep_dir = Path(config.hydra.sweep.dir)
            announce(build_report([sweep_dir], sweep_dir / "report"))
