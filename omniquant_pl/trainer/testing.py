"""The command ``test``: perplexities of a finished run."""

from __future__ import annotations

from rich.console import Console

from omniquant_pl.data import CalibrationData
from omniquant_pl.evaluate import VARIANTS, perplexity_table
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.report import write_report
from omniquant_pl.trainer.run import RunTrainer

__all__ = ["measure_run"]


def measure_run(
    trainer: RunTrainer,
    model: OmniQuantModel,
    datamodule: CalibrationData,
    ckpt_path: str | None = None,
    weights_only: bool | None = None,
) -> dict[str, dict[str, float]]:
    """Measure the perplexity of a finished run, next to full precision and round-to-nearest.

    Args:
        trainer: Whose run it is.
        model: The run's model settings.
        datamodule: What to evaluate on.
        ckpt_path: Not used; a run's configuration may carry it.
        weights_only: Likewise.

    Returns:
        Perplexity by name of the evaluation set and variant, which ``metrics.json`` and ``report.html`` hold from
        now on as well.

    Raises:
        ConfigurationError: If the run is not finished or does not fit the settings.
    """
    del ckpt_path, weights_only
    trainer.prepare(model, datamodule)
    evaluation = trainer.evaluation(model)
    perplexities: dict[str, dict[str, float]] = {}
    for variant in reversed(VARIANTS):  # an unfinished run is refused at once
        for name, value in evaluation.measure(variant).items():
            perplexities.setdefault(name, {})[variant] = value
    metrics = trainer.run_folder.read_metrics()
    trainer.run_folder.write_metrics(metrics | {"perplexity": metrics.get("perplexity", {}) | perplexities})
    if trainer.run_folder.report.is_file():
        write_report(trainer.run_folder)
    Console().print(perplexity_table(perplexities))
    return perplexities
