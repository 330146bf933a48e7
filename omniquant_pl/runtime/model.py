"""Loading a packed folder."""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig, PreTrainedModel

from omniquant_pl.errors import ConfigurationError
from omniquant_pl.runtime.folder import PackedFolder
from omniquant_pl.runtime.skeleton import PackedSkeleton
from omniquant_pl.utils.devices import devices_here

__all__ = ["load_packed", "usable_device", "use_generation_config"]

# What transformers and torch raise for a configuration that makes no model.
_NO_MODEL = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)


def load_packed(
    folder: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """Load a folder that ``export --format packed`` has written; no code that comes with it runs.

    The result is a model of transformers' own class, with ``generate`` and all else, whose quantized linears compute
    with packed codes and quantize their inputs, and the attention's, where the scheme says so. Besides the model no
    more than a few tensors are in memory. On the CPU packed weights are not read before they are used: the folder has
    to stay as it is meanwhile.

        >>> model = load_packed("runs/w4a16g128/packed")
        >>> tokenizer = AutoTokenizer.from_pretrained("runs/w4a16g128/packed")
        >>> tokens = model.generate(**tokenizer("Once", return_tensors="pt"), max_new_tokens=20)

    Args:
        folder: The folder.
        dtype: What is not quantized is held and computed in it: float32, bfloat16 or float16; float64 to compare with.
        device: Where to.

    Raises:
        ConfigurationError: If a file is missing, damaged, or does not fit the others; it names the file, and the tensor
            where it is one. Or there is no such device.
    """
    target = usable_device(device)
    opened = PackedFolder(Path(folder))
    try:
        skeleton = PackedSkeleton(opened.config, opened.scheme, opened.names, dtype, target)
    except _NO_MODEL as error:
        reason = " ".join(str(error).removeprefix("model.path: ").split())
        raise ConfigurationError("packed", f"{folder}: config.json and the tensors do not fit: {reason}") from error
    opened.check_exclusive(skeleton.slots)
    opened.fill(skeleton.slots)
    model = skeleton.finish()
    use_generation_config(model, opened.folder)
    return model


def use_generation_config(model: PreTrainedModel, folder: Path) -> None:
    """Take over what ``generation_config.json`` says, where there is one.

    Raises:
        ConfigurationError: If it is damaged.
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        return
    try:
        model.generation_config = GenerationConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigurationError("packed", f"{path} is damaged: {error}") from error


def usable_device(name: torch.device | str) -> torch.device:
    """Return a device to compute on.

    Raises:
        ConfigurationError: If this machine has no such device.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        message = f"{name} is not a device of this machine, which has: {devices_here()}"
        raise ConfigurationError("device", message) from error
    return device
