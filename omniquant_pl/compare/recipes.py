"""The methods of this project that a model can be quantized by, as settings of a fit.

They differ from each other in nothing but these settings: model, scheme, tokens and seed are the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from omniquant_pl.spec import Scheme
from omniquant_pl.utils.presets import find_preset

__all__ = ["RECIPES", "Case", "Recipe", "Settings", "configuration"]

Settings = dict[str, Any]
"""Values by their keys in YAML, for example ``model.clipping``."""

_SHARED = {
    "model": ("path", "weights", "activations", "activation_dtype", "activation_budget", "trust_remote_code"),
    "data": ("dataset", "samples", "sequence_length", "evaluation"),
    "trainer": ("accelerator", "precision"),  # the precision that pays is the device's, not the method's
}
"""What a comparison keeps of its configuration, by section; the rest is the method's. Every fit has one device."""


@dataclass(frozen=True)
class Case:
    """What is to be quantized."""

    scheme: Scheme
    """To which widths."""
    model_type: str
    """The model's family."""


@dataclass(frozen=True)
class Recipe:
    """One row of a comparison."""

    title: str
    """What people call it."""
    settings: Callable[[Case], Settings | str]
    """What it changes of the defaults, or why it cannot do a case."""


_NO_EPOCHS: Settings = {"model.clipping": None, "model.transform": None, "trainer.max_epochs": 0}
_FULL_RANGE = 20.0  # sigmoid(20) is 1 in float32: a share of 1 keeps the whole range


def _round_to_nearest(case: Case) -> Settings:
    del case
    return _NO_EPOCHS


def _smoothquant(case: Case) -> Settings:
    """Scales between norms and linears, alpha chosen by output error (arXiv 2211.10438); no clipping."""
    del case
    return _NO_EPOCHS | {"model.transform": {"initial": "search"}}


def _awq(case: Case) -> Settings | str:
    """Activation-aware scales and clipping (arXiv 2306.00978)."""
    if case.scheme.activations is not None:
        return "it is made for weights alone"
    clipping = {"search": True, "initial": _FULL_RANGE}
    return _NO_EPOCHS | {"model.transform": {"initial": "awq", "mlp": True}, "model.clipping": clipping}


def _gptq(case: Case) -> Settings:
    """Codes that make up for each other's errors (arXiv 2210.17323), on the full range."""
    del case
    return _NO_EPOCHS | {"model.rounding": {"method": "gptq"}}


def _paper(case: Case) -> Settings:
    """Return the published settings (arXiv 2308.13137): weights alone are transformed in OPT only."""
    is_two_bit = case.scheme.weights.bits == 2
    transforms = case.scheme.activations is not None or case.model_type == "opt"
    return {
        "model.clipping": {"lr": 1e-2},
        "model.transform": {"lr": 5e-3, "alpha": 0.5} if transforms else None,
        "model.objective": {"aug_loss": is_two_bit},
        "trainer.max_epochs": 40 if is_two_bit else 20,
    }


def _best(case: Case) -> Settings | str:
    """Return the preset that measured best for the scheme."""
    name = f"best/{case.scheme.name}.yaml"
    path = find_preset(name)
    if path is None:
        return f"there is no preset configs/{name}"
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    taken = {section: {*keys, "default_root_dir"} for section, keys in _SHARED.items()}
    return {
        f"{section}.{key}": value
        for section in _SHARED
        for key, value in content[section].items()
        if key not in taken[section]
    }


RECIPES: dict[str, Recipe] = {
    "rtn": Recipe("RTN", _round_to_nearest),
    "smoothquant": Recipe("SmoothQuant", _smoothquant),
    "awq": Recipe("AWQ", _awq),
    "gptq": Recipe("GPTQ", _gptq),
    "paper": Recipe("OmniQuant, paper", _paper),
    "best": Recipe("OmniQuant, best", _best),
}
"""By the name in ``methods``."""


def configuration(given: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """Return the configuration of a fit by a method.

    Args:
        given: The comparison's resolved configuration.
        settings: The method's.
    """
    config: dict[str, Any] = {"seed_everything": given["seed_everything"]}
    for section, keys in _SHARED.items():
        config[section] = {key: given[section][key] for key in keys}
    for key, value in settings.items():
        section, _, name = key.partition(".")
        config[section][name] = value
    return config
