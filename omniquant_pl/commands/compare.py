"""The command ``compare``: the same model by several methods."""

from __future__ import annotations

from rich.console import Console

from omniquant_pl.compare.comparison import Comparison, MethodName
from omniquant_pl.compare.method import MethodInputs
from omniquant_pl.compare.row import Row, comparison_table
from omniquant_pl.data import CalibrationData
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.run.folder import RunFolder
from omniquant_pl.trainer.run_trainer import RunTrainer
from omniquant_pl.utils.signals import SignalHandler

__all__ = ["compare_methods"]


def compare_methods(
    trainer: RunTrainer,
    model: OmniQuantModel,
    datamodule: CalibrationData,
    methods: list[MethodName] | None = None,
) -> list[Row]:
    """Quantize the same model by several methods, each in a process of its own; finished ones are kept.

    Args:
        trainer: Whose run folder gets the rows.
        model: Which model, and the scheme; what else is set here is each method's own.
        datamodule: What all of them calibrate and are measured on.
        methods: Which, in the order of the rows. rtn, smoothquant, awq, gptq: this project's, without an epoch;
            nf4, int8: of bitsandbytes, in storage of their own; paper, best: OmniQuant at the published settings,
            and at those of configs/best; the others: tools that are installed beside this package. null: all.

    Returns:
        One row a method.

    Raises:
        ConfigurationError: If model or data cannot be used.
    """
    tokens = trainer.prepare(model, datamodule)
    bench = MethodInputs(trainer.settings, model, tokens, trainer.evaluation_tokens, str(trainer.strategy.root_device))
    folder = trainer.run_folder.path
    with SignalHandler().listening(), RunFolder(trainer.run_folder.comparison).locked():
        rows = Comparison(bench, folder).run(methods)
    Console().print(comparison_table(rows))
    return rows
