"""Accuracies on the tasks of lm-eval, by name or from local files, with their standard errors."""

from __future__ import annotations

import difflib
import importlib.util
import logging
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from omniquant_pl.checkpoint.hub import reach_hub
from omniquant_pl.errors import ConfigurationError

__all__ = ["Scores", "ZeroShot", "zero_shot_table"]

Scores = dict[str, dict[str, float]]
"""By task: every metric, such as ``acc``, and its standard error, ``acc_stderr``."""


class ZeroShot:
    """Tasks, loaded with their data before any model is.

    Args:
        tasks: Names that lm-eval knows, such as ``piqa`` or ``mmlu``, paths of task files (.yaml), and folders of them.
        shots: Solved examples in front of each question.
        limit: Questions of each task; ``None`` for all.
        batch_size: Questions that are computed together.

    Raises:
        ConfigurationError: If lm-eval is not installed, or a task is not known, is damaged, or has no data.
    """

    def __init__(self, tasks: Sequence[str], shots: int = 0, limit: int | None = None, batch_size: int = 8) -> None:
        for key, value, least in (("shots", shots, 0), ("limit", limit, 1), ("batch_size", batch_size, 1)):
            if value is not None and value < least:
                raise ConfigurationError(key, f"{value} is below {least}")
        if not tasks:
            raise ConfigurationError("zero_shot", "[] names no task; give for example [piqa, arc_easy]")
        if importlib.util.find_spec("lm_eval") is None:
            raise ConfigurationError("zero_shot", "lm-eval is not installed: pip install 'omniquant-pl[eval]'")
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        self._limit = limit
        self._suffix = f", {shots} shots" if shots else ""
        self._batch_size = batch_size
        with reach_hub(import_module("datasets").config):  # without retries where it does not answer
            self._names, self._loaded = _load(tasks)
        for task in self._loaded["tasks"].values():
            task.set_config(key="num_fewshot", value=shots)
            task.set_fewshot_seed(seed=1234)  # lm-eval's own

    def measure(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Scores:
        """Return what a model scores; with examples, their number stands behind a task's name.

        Args:
            model: On its device, in the dtype to compute in.
            tokenizer: Its tokenizer.
        """
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM

        program = HFLM(model, tokenizer=tokenizer, backend="causal", batch_size=self._batch_size)
        found = evaluate(program, self._loaded, limit=self._limit, log_samples=False)
        results = found["results"] | found.get("groups", {})
        return {f"{name}{self._suffix}": _numbers(results[name]) for name in self._names}


def _load(tasks: Sequence[str]) -> tuple[list[str], Any]:
    """Return the names under which results are asked for, and lm-eval's tasks with their data."""
    from lm_eval.tasks import TaskManager

    folders = [task for task in tasks if Path(task).is_dir()]
    are_local = all(Path(task).exists() for task in tasks)
    manager = TaskManager(include_path=folders, include_defaults=not are_local)
    specs = [name for task in tasks for name in ([task] if task not in folders else _in_folder(task))]
    names: list[str] = []
    for spec in specs:
        loaded = _loaded(manager, spec)
        names += [spec] if spec in loaded["groups"] else list(loaded["tasks"])
    if len(set(names)) < len(names):
        raise ConfigurationError("zero_shot", f"{list(tasks)} names a task twice: {', '.join(names)}")
    return names, manager.load(specs)


def _in_folder(folder: str) -> list[str]:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=folder, include_defaults=False)
    found: list[str] = manager.all_groups or manager.all_subtasks
    if not found:
        raise ConfigurationError("zero_shot", f"there is no task file (.yaml with a key task) in {folder}")
    return found


def _loaded(manager: Any, spec: str) -> Any:
    """Load one task or group; whatever goes wrong, in a file of its or in its data, is said in one line."""
    if spec not in manager.task_index and not Path(spec).is_file():
        near = difflib.get_close_matches(spec, manager.all_tasks, n=5)
        known = ", ".join(near) or "those that lm_eval ls tasks lists"
        message = f"{spec!r} is neither a task of lm-eval nor a task file; near it: {known}"
        raise ConfigurationError("zero_shot", message)
    try:
        return manager.load([spec])
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigurationError("zero_shot", f"{spec} cannot be loaded: {reason}") from error


def _numbers(scores: Mapping[str, Any]) -> dict[str, float]:
    """Leave out what is no number, and the name of a filter that does nothing."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in scores.items()
        if "," in name and isinstance(value, int | float)
    }


def zero_shot_table(results: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Table:
    """Return a table with a metric of a task a row and a variant of the model a column.

    Args:
        results: By task and variant, as ``metrics.json`` has them.
    """
    variants = list(dict.fromkeys(variant for values in results.values() for variant in values))
    table = Table("task", "metric", *(variant.replace("_", " ") for variant in variants))
    for task, values in results.items():
        metrics = dict.fromkeys(metric for scores in values.values() for metric in scores)
        for metric in (name for name in metrics if "_stderr" not in name):
            table.add_row(task, metric, *(_shown(values.get(variant, {}), metric) for variant in variants))
    return table


def _shown(scores: Mapping[str, float], metric: str) -> str:
    if metric not in scores:
        return ""
    name, _, of_filter = metric.partition(",")
    error = scores.get(f"{name}_stderr" + (f",{of_filter}" if of_filter else ""))
    return f"{scores[metric]:.4f}" + ("" if error is None else f" ± {error:.4f}")
