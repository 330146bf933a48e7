"""Keeps ``metrics.json`` up to date: after every block, and with the perplexities at the end."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from lightning.pytorch import Trainer
from typing_extensions import override

from omniquant_pl import __version__
from omniquant_pl.blocks.quantized_block import QuantizedBlock
from omniquant_pl.calibration.hooks import BlockResult, CalibrationCallback, CalibrationTrainer, calibration_trainer
from omniquant_pl.evaluate import model_sizes
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.quant.storage import bits_per_weight
from omniquant_pl.run.fingerprint import digest_of
from omniquant_pl.utils.memory import peak_memory

__all__ = ["MetricsCallback"]

_PACKAGES = ("torch", "lightning", "transformers", "safetensors")


class MetricsCallback(CalibrationCallback):
    """Collects what a run measures and evaluates the three variants of the model.

    Attributes:
        metrics: The content of ``metrics.json`` so far.
    """

    def __init__(self) -> None:
        self.metrics: dict[str, Any] = {}
        self._started = self._calibration_started = self._calibrated_before = 0.0

    @override
    def on_calibration_start(self, trainer: CalibrationTrainer, model: OmniQuantModel) -> None:
        belongs_to = {**trainer.fingerprint, "evaluation": digest_of(trainer.evaluation_tokens)}
        known = trainer.run_folder.read_metrics() if trainer.resumes else {}
        if {**known.get("fingerprint", {}), "evaluation": known.get("evaluation_sha256")} != belongs_to:
            known = {}
        seconds = known.get("seconds", {})
        self._started = time.perf_counter() - seconds.get("total", 0.0)
        self._calibrated_before = seconds.get("calibration", 0.0)
        self.metrics = {
            "model": model.path,
            "scheme": model.scheme.name,
            "perplexity": {name: known.get("perplexity", {}).get(name, {}) for name in trainer.evaluation_tokens},
            "blocks": [],
            "seconds": {"total": 0.0, "calibration": 0.0, "evaluation": seconds.get("evaluation", 0.0)},
            "peak_memory_bytes": {},
            "bits_per_weight": bits_per_weight(model.quantized_weights.values()),
            "size_bytes": model_sizes(model),
            "versions": _versions(),
            "fingerprint": dict(trainer.fingerprint),
            "evaluation_sha256": belongs_to["evaluation"],
            **{name: known[name] for name in ("zero_shot",) if name in known},
        }

    @override
    def on_baseline(self, trainer: CalibrationTrainer, model: OmniQuantModel) -> None:
        self._evaluate(trainer, model, "full_precision")
        self._calibration_started = time.perf_counter() - self._calibrated_before
        if not trainer.resumes:
            self._write(trainer)

    @override
    def on_segment_start(self, trainer: CalibrationTrainer, index: int, blocks: range) -> None:
        self.metrics["blocks"] = []

    @override
    def on_segment_end(self, trainer: CalibrationTrainer, index: int, blocks: range) -> None:
        self._write(trainer)

    @override
    def on_segments_joined(self, trainer: CalibrationTrainer, results: Sequence[BlockResult]) -> None:
        self.metrics["blocks"] = [asdict(result) for result in results]
        self.metrics["seconds"]["inputs"] = trainer.input_seconds  # of the segments
        self.metrics["seconds"]["calibration"] = time.perf_counter() - self._calibration_started
        self._write(trainer)

    @override
    def on_block_restored(self, trainer: CalibrationTrainer, result: BlockResult) -> None:
        self.metrics["blocks"].append(asdict(result))

    @override
    def on_block_end(self, trainer: CalibrationTrainer, block: QuantizedBlock, result: BlockResult) -> None:
        self.metrics["blocks"].append(asdict(result))
        self.metrics["seconds"]["calibration"] = time.perf_counter() - self._calibration_started
        self._write(trainer)

    @override
    def on_calibration_end(self, trainer: CalibrationTrainer, model: OmniQuantModel) -> None:
        self._evaluate(trainer, model, "round_to_nearest")  # what it tells is of use now: the first block came sooner
        self._write(trainer)
        self._evaluate(trainer, model, "quantized")
        self._write(trainer)

    def _evaluate(self, trainer: CalibrationTrainer, model: OmniQuantModel, variant: str) -> None:
        known = self.metrics["perplexity"].values()
        if trainer.resumes and variant != "quantized" and all(variant in values for values in known):
            return
        trainer.call_hook(CalibrationCallback.on_evaluation_start, variant)
        started = time.perf_counter()
        perplexities = trainer.evaluation(model).measure(variant)
        seconds = time.perf_counter() - started
        for name, value in perplexities.items():
            self.metrics["perplexity"][name][variant] = value
        self.metrics["seconds"]["evaluation"] += seconds
        trainer.call_hook(CalibrationCallback.on_evaluation_end, variant, perplexities, seconds)

    def _write(self, trainer: Trainer) -> None:
        trainer = calibration_trainer(trainer)
        self.metrics["seconds"]["total"] = time.perf_counter() - self._started
        self.metrics["peak_memory_bytes"] = peak_memory(trainer.strategy.root_device)
        if trainer.is_global_zero:
            trainer.run_folder.write_metrics(self.metrics)


def _versions() -> dict[str, str]:
    packages = {package: version(package) for package in _PACKAGES}
    return {"omniquant-pl": __version__, "python": platform.python_version(), **packages}
