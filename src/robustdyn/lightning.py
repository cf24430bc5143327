"""For Lightning projects: a callback that measures any LightningModule while it trains."""

from robustdyn.measure.lightning_callback import MeasureCurvature

__all__ = ["MeasureCurvature"]
