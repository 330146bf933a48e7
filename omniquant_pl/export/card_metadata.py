"""What the hub reads of a model card: where the model is from, what it is, what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from omniquant_pl.checkpoint import is_hub_id
from omniquant_pl.data.hub import HUB_DATASETS
from omniquant_pl.model import OmniQuantModel

__all__ = ["card_metadata"]

_NULL = ("~", "null")
_INHERITED = ("license", "license_name", "license_link", "language")


def card_metadata(model: OmniQuantModel, metrics: Mapping[str, Any], library: str, base: str) -> str:
    """Return the YAML in front of a model card, in the form of the hub's model cards.

    Args:
        model: The settings.
        metrics: The run's metrics.
        library: What loads the model.
        base: The original model's name.
    """
    from huggingface_hub import EvalResult, ModelCardData  # slow to import

    origin: dict[str, Any] = (
        {"base_model": model.path, "base_model_relation": "quantized"} if is_hub_id(model.path) else {}
    )
    weights = model.scheme.weights
    data = ModelCardData(
        **origin,
        **_inherited(model.source.folder),
        library_name=library,
        pipeline_tag="text-generation",
        tags=["omniquant", "quantized", f"{weights.bits}-bit", model.scheme.name],
        model_name=f"{base}, {model.scheme.name} by OmniQuant",
        eval_results=[EvalResult(**result) for result in _results(metrics)] or None,
    )
    return str(data.to_yaml())


def _inherited(folder: Path) -> dict[str, Any]:
    """Return what the original's own card says that holds for what is made of it as well; nothing where there is none.

    The hub reads YAML 1.2, in which ``no`` is Norwegian. PyYAML reads 1.1, in which it is false, so values are taken
    as they are written: all of these are strings.
    """
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    card = folder / "README.md"
    head = REGEX_YAML_BLOCK.match(card.read_text(encoding="utf-8-sig", errors="replace")) if card.is_file() else None
    if head is None:
        return {}
    try:
        found = yaml.load(head[2], Loader=yaml.BaseLoader)
    except yaml.YAMLError:
        return {}
    known = found if isinstance(found, dict) else {}
    return {key: known[key] for key in _INHERITED if known.get(key) and known[key] not in _NULL}


def _results(metrics: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for name, values in metrics.get("perplexity", {}).items():
        if values.get("quantized") is not None:
            yield _result(name, "perplexity", values["quantized"])
    for task, values in metrics.get("zero_shot", {}).items():
        for metric, value in values.get("quantized", {}).items():
            if "_stderr" not in metric:
                yield _result(task, metric, value)


def _result(name: str, metric: str, value: float) -> dict[str, Any]:
    """Return a measurement in the hub's words, with the dataset's id there where it is known."""
    hub = HUB_DATASETS.get(name, {}).get("evaluation")
    return {
        "task_type": "text-generation",
        "dataset_name": name,
        "dataset_type": name if hub is None else hub.repository,
        "metric_type": metric,
        "metric_value": value,
    }
