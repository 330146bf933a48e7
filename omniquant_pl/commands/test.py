"""The command ``test``: perplexities of a finished run, and zero-shot tasks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from omniquant_pl.commands.zero_shot import measure_zero_shot, task_tokenizer
from omniquant_pl.data import CalibrationData
from omniquant_pl.errors import ConfigurationError
from omniquant_pl.evaluate import ZeroShot, perplexity_table, zero_shot_table
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.report import write_report
from omniquant_pl.run.folder import RunFolder
from omniquant_pl.trainer.run_trainer import RunTrainer

__all__ = ["measure_run"]


def measure_run(
    trainer: RunTrainer,
    model: OmniQuantModel,
    datamodule: CalibrationData,
    zero_shot: list[str] | None = None,
    shots: int = 0,
    limit: int | None = None,
    batch_size: int = 8,
    exported: str | None = None,
) -> dict[str, Any]:
    """Measure a finished run, next to full precision and round-to-nearest: perplexity, and zero-shot tasks.

    Args:
        trainer: Whose run it is.
        model: The run's model settings.
        datamodule: What to evaluate on.
        zero_shot: Tasks of lm-eval by name (piqa, arc_easy, arc_challenge, boolq, hellaswag, winogrande, mmlu),
            task files (.yaml) and folders of them; null: none. The model is in memory whole.
        shots: Solved examples in front of each of their questions.
        limit: Ask so many questions of each task, and write nothing down; null: all.
        batch_size: Questions that are computed together.
        exported: Measure the tasks on this exported folder instead of the run's model, and no perplexity.

    Returns:
        ``perplexity`` by evaluation set and variant, ``zero_shot`` by task and variant, as ``metrics.json`` and
        ``report.html`` hold them from now on, unless ``limit`` is set.

    Raises:
        ConfigurationError: If the run is not finished or does not fit the settings, a task cannot be loaded, or
            there is no tokenizer to read it with.
    """
    if exported is not None and zero_shot is None:
        raise ConfigurationError("exported", "only tasks are measured on a folder; set zero_shot as well")
    tasks = None
    if zero_shot is not None:
        task_tokenizer(model)  # refused before tasks are fetched and perplexities measured
        tasks = ZeroShot(zero_shot, shots, limit, batch_size)
    trainer.prepare(model, datamodule)
    found: dict[str, Any] = {}
    if exported is None:
        found["perplexity"] = trainer.evaluation(model).measure_all()
        Console().print(perplexity_table(found["perplexity"]))
        if limit is None:
            _write_down(found, trainer.run_folder)  # tasks may fail
    if tasks is not None:
        folder, device = None if exported is None else Path(exported), trainer.strategy.root_device
        found["zero_shot"] = measure_zero_shot(tasks, model, trainer.run_folder, folder, device)
        Console().print(zero_shot_table(found["zero_shot"]))
        if limit is None:
            _write_down(found, trainer.run_folder)
    return found


def _write_down(found: Mapping[str, Any], run: RunFolder) -> None:
    run.add_metrics(found)
    if run.report.is_file():
        write_report(run)
