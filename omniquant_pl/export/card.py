"""The model card of an exported folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from omniquant_pl.export.card_metadata import card_metadata
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.run.folder import MADE_BY, VARIANTS, RunFolder

__all__ = ["model_card"]

_CARD = """---
{metadata}
---
# {base}, {scheme} by OmniQuant

{storage}
{code}{activations}
{made_by}{method}) on {data}.

| perplexity | full precision | round to nearest | calibrated |
|---|---|---|---|
{perplexities}
{zero_shot}
{command}
"""


def model_card(
    model: OmniQuantModel,
    folder: RunFolder,
    storage: str,
    quantizes_activations: bool = False,
    library: str = "transformers",
    code_note: str = "",
) -> str:
    """Return the README.md of an exported folder.

    Args:
        model: The settings.
        folder: The run, for its metrics and configuration.
        storage: One sentence on how this format holds the weights.
        quantizes_activations: Whether programs that load the folder quantize activations as the scheme says.
        library: What loads the folder, in the hub's words.
        code_note: What happened to Python code of the original; empty if it has none, or all of it came along.
    """
    config = yaml.safe_load(folder.config.read_text(encoding="utf-8")) if folder.config.is_file() else {}
    metrics = folder.read_metrics()
    return _CARD.format(
        metadata=card_metadata(model, metrics, library, _name(model.path)),
        base=_name(model.path),
        scheme=model.scheme.name,
        storage=storage,
        code=f"{code_note}\n" if code_note else "",
        activations=_activations(model, quantizes_activations),
        made_by=MADE_BY,
        method=_method(model, config),
        data=_data(config),
        perplexities=_perplexities(metrics.get("perplexity", {})),
        zero_shot=_zero_shot(metrics.get("zero_shot", {})),
        command="The `config.yaml` of the run reproduces it: `python train.py fit --config config.yaml`.",
    )


def _method(model: OmniQuantModel, config: Mapping[str, Any]) -> str:
    """Say what has learned, what was only set, and what else was done."""
    settings = {
        "clipping": model.clipping,
        "transform": model.transform,
        "rounding": model.rounding.method == "learned",
    }
    factors = " and ".join(", ".join(name for name, used in settings.items() if used).rsplit(", ", 1))
    learns = (config.get("trainer") or {}).get("max_epochs") != 0
    parts = [(f"learned {factors}" if learns else f"{factors} as they start") if factors else "nothing learned"]
    if learns and factors and model.objective.window.blocks > 1:
        parts.append(f"windows of {model.objective.window.blocks} blocks")
    if model.rounding.method == "gptq":
        parts.append("GPTQ rounding")
    if model.rotation is not None:
        parts.append("Hadamard rotations folded in")
    return ", ".join(parts)


def _activations(model: OmniQuantModel, are_quantized: bool) -> str:
    if model.scheme.activations is None:
        return "Activations stay in 16 bit or more.\n"
    bits = model.scheme.activations.bits
    if are_quantized:
        return f"Inputs of linears and of attention are quantized to {bits} bit per token while the model runs.\n"
    return (
        f"The scheme quantizes activations to {bits} bit per token. A program that does not, as transformers loading "
        "this folder, computes with better activations than the perplexity below was measured with.\n"
    )


def _data(config: Mapping[str, Any]) -> str:
    data = config.get("data")
    if not data:
        return "calibration data that was not recorded"
    length = f" of {data['sequence_length']} tokens" if data["sequence_length"] else ""
    return f"{data['samples']} samples{length} from {_name(data['dataset'])}, seed {config['seed_everything']}"


def _name(path: str) -> str:
    """Return a hub id or an embedded name as it is, of a local path its last part."""
    return Path(path).name if Path(path).exists() else path


def _perplexities(perplexities: Mapping[str, Mapping[str, float]]) -> str:
    rows = (
        f"| {name} | " + " | ".join(f"{values[v]:.4f}" if values.get(v) is not None else "" for v in VARIANTS) + " |"
        for name, values in perplexities.items()
    )
    return "\n".join(rows)


def _zero_shot(tasks: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Return a table of the tasks that were measured, nothing where there were none."""
    variants = ("full_precision", "quantized")
    rows = [
        f"| {task}, {metric} | {' | '.join(_scored(values[v], metric) if v in values else '' for v in variants)} |"
        for task, values in tasks.items()
        for metric in values.get("quantized", {})
        if "_stderr" not in metric
    ]
    return "\n".join(["", "| zero-shot | full precision | calibrated |", "|---|---|---|", *rows, ""]) if rows else ""


def _scored(scores: Mapping[str, float], metric: str) -> str:
    error = scores.get(f"{metric}_stderr")
    return f"{scores[metric]:.4f}" + ("" if error is None else f" ± {error:.4f}")
