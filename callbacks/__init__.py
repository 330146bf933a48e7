"""Lightning callbacks: fold, export, checkpoint, metrics, report, progress, numerics; one file each."""

from omniquant_pl.callbacks.best import KeepBestState
from omniquant_pl.callbacks.checkpoint import CheckpointCallback
from omniquant_pl.callbacks.config import SaveConfig
from omniquant_pl.callbacks.export import ExportCallback
from omniquant_pl.callbacks.fold import FoldCallback
from omniquant_pl.callbacks.metrics import MetricsCallback
from omniquant_pl.callbacks.numerics import NumericsGuard
from omniquant_pl.callbacks.progress import ProgressCallback
from omniquant_pl.callbacks.report import ReportCallback

__all__ = [
    "CheckpointCallback",
    "ExportCallback",
    "FoldCallback",
    "KeepBestState",
    "MetricsCallback",
    "NumericsGuard",
    "ProgressCallback",
    "ReportCallback",
    "SaveConfig",
]
