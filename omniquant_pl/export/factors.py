"""The learned factors alone: with the model that they were learned for, they make the calibrated model again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from typing_extensions import override

from omniquant_pl.export.card import model_card
from omniquant_pl.export.folded import ModelTensors
from omniquant_pl.export.folder import atomic_directory
from omniquant_pl.export.format import Export, Limits
from omniquant_pl.initialization.factor_file import FACTOR_FILE, write_factor_file
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.run.folder import RunFolder
from omniquant_pl.utils.files import write_text

__all__ = ["FactorsExport"]

_SETTINGS = "factors.yaml"
_STORAGE = (
    f"The learned factors alone. `python train.py fit --config {_SETTINGS} --model.path ORIGINAL --model.parameters "
    f"{FACTOR_FILE}` makes the calibrated model of them and the original one."
)


class FactorsExport(Export):
    """Writes the one file that ``model.parameters`` takes, and the settings that they make the same model with."""

    name = "factors"
    description = "what the run has learned, alone, for model.parameters"
    limits = Limits(
        weights="[what the run has learned](#learned-factors-alone), alone, a few per cent of the model; not with "
        "`model.rounding.method` `learned` or `gptq`",
        activations="",
        loaded_by="`model.parameters`",
    )
    library = "omniquant-pl"
    clients = ()

    @override
    def refusal(self, model: OmniQuantModel) -> str | None:
        if model.rounding.method != "nearest":
            method = model.rounding.method
            return f"with model.rounding.method {method} its codes are not those that follow from the factors"
        return None

    @override
    def kept_dtypes(self, tensors: ModelTensors) -> Mapping[str, torch.dtype]:
        return {}

    @override
    def write(self, model: OmniQuantModel, run: RunFolder, output: Path) -> None:
        with atomic_directory(output, run.path, model.source.folder) as target:
            content = {"model": model.path, "scheme": model.scheme.name}
            write_factor_file(target / FACTOR_FILE, run, model.source, content)
            write_text(target / _SETTINGS, yaml.safe_dump(_settings(model), sort_keys=False))
            write_text(target / "README.md", model_card(model, run, _STORAGE, library=self.library))


def _settings(model: OmniQuantModel) -> dict[str, Any]:
    """Return the configuration of a fit without an epoch."""
    specs = {
        "weights": model.scheme.weights,
        "activations": model.scheme.activations,
        "clipping": model.clipping,
        "transform": model.transform,
        "rotation": model.rotation,
    }
    section = {name: None if spec is None else asdict(spec) for name, spec in specs.items()}
    if section["transform"] is not None:
        section["transform"] |= {"scales": None, "shifts": None}  # files that only a start without factors reads
    return {"model": section, "trainer": {"max_epochs": 0}}
