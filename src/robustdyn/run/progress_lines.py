"""Shows one progress bar for the whole run with its remaining time, or plain lines without a terminal."""

import sys
import time
from typing import Any

import lightning
from lightning.pytorch.callbacks.progress.progress_bar import ProgressBar
from tqdm import tqdm

from robustdyn.methods import AdversarialTraining
from robustdyn.records.schema import TEST_ROBUST_LOSS, TRAIN_ROBUST_LOSS

LINES_WITHOUT_TERMINAL = 10
SHOWN = {"train robust loss": TRAIN_ROBUST_LOSS, "test robust loss": TEST_ROBUST_LOSS}


class RunProgress(ProgressBar):
    """A bar over the run's epochs, because people ask when a run ends, not where in an epoch it is.

    Args:
        label: Names the run, e.g. ``"demo seed=0"``.
    """

    def __init__(self, label: str) -> None:
        super().__init__()
        self._label = label
        self._enabled = True
        self._bar: tqdm[Any] | None = None
        self._started = 0.0
        self._first_epoch = 0

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print a line of something that takes long within an epoch."""
        if self._enabled:
            tqdm.write(f"{self._label}: {' '.join(map(str, args))}", file=sys.stderr)
            sys.stderr.flush()

    def disable(self) -> None:
        """Show nothing; Lightning calls this on every rank but the first."""
        self._enabled = False

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start the bar at the epoch where the run begins or resumes."""
        self._started, self._first_epoch = time.monotonic(), trainer.current_epoch
        if self._enabled and trainer.global_step:
            at = f"epoch {trainer.current_epoch}/{trainer.max_epochs}, step {trainer.global_step}"
            print(f"{self._label}: continues after {at}", file=sys.stderr, flush=True)
        if self._enabled and sys.stderr.isatty():
            self._bar = tqdm(
                total=trainer.max_epochs,
                initial=trainer.current_epoch,
                desc=self._label,
                unit="epoch",
                dynamic_ncols=True,
            )

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Advance by an epoch and show the robust losses."""
        if not self._enabled or not isinstance(pl_module, AdversarialTraining):
            return
        metrics = pl_module.epoch_metrics()  # already reduced over ranks, by the record
        values = {name: f"{metrics[key]:.3f}" for name, key in SHOWN.items() if key in metrics}
        if self._bar is not None:
            self._bar.set_postfix(values, refresh=False)
            self._bar.update(1)
        else:
            self._print_line(trainer.current_epoch + 1, int(trainer.max_epochs or 0), values)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Say so if there was nothing to train."""
        if self._enabled and not self._started:
            what = f"{trainer.current_epoch} of {trainer.max_epochs} epochs"
            print(f"{self._label}: {what} were finished already", file=sys.stderr, flush=True)

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Close the bar, so that the error starts on a line of its own."""
        self._close()

    def _print_line(self, done: int, total: int, values: dict[str, str]) -> None:
        if done != total and done % max(1, total // LINES_WITHOUT_TERMINAL):
            return
        elapsed = time.monotonic() - self._started
        left = elapsed / (done - self._first_epoch) * (total - done)
        parts = [f"{name} {value}" for name, value in values.items()]
        parts.append(f"{tqdm.format_interval(elapsed)} elapsed, {tqdm.format_interval(left)} left")
        print(f"{self._label}: epoch {done}/{total}, {', '.join(parts)}", file=sys.stderr, flush=True)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
