"""Which models in memory can be quantized, and what their tokens must keep to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from omniquant_pl.errors import CalibrationError, ConfigurationError
from omniquant_pl.families import conversion_of, family_of

__all__ = ["Limits", "check_finite", "check_model", "check_tokenizer"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Limits:
    """What a model's token ids must keep to."""

    positions: int
    """The longest sequence that the model can read."""
    vocabulary: int
    """Number of token ids."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> Limits:
        """Return the limits that a model's configuration states."""
        config = model.config.get_text_config()
        return cls(int(config.max_position_embeddings), int(config.vocab_size))


def check_model(model: object) -> None:
    """Refuse what is no causal language model in full precision on one device.

    Raises:
        ConfigurationError: If that is so; it says what to give instead.
    """
    if not isinstance(model, PreTrainedModel):
        raise ConfigurationError("model", _instead_of(model))
    for reason in (_adapters(model), _quantization(model), _dispatch(model), _tensors(model)):
        if reason is not None:
            raise ConfigurationError("model", reason)
    if model.get_output_embeddings() is None:
        message = f"{type(model).__name__} has no language-model head; load it by AutoModelForCausalLM"
        raise ConfigurationError("model", message)
    if conversion_of(model.config.model_type) is None:
        try:
            family_of(model.config)
        except ConfigurationError as error:
            raise ConfigurationError("model", str(error).removeprefix(f"{error.key}: ")) from error


def _instead_of(model: object) -> str:
    if isinstance(model, nn.Module):
        if hasattr(model, "merge_and_unload"):
            return f"a {type(model).__name__} has adapters; merge them first: model.merge_and_unload()"
        for attribute in ("_orig_mod", "module"):  # of torch.compile, of data parallelism
            if isinstance(getattr(model, attribute, None), nn.Module):
                return f"a {type(model).__name__} wraps another model; give that one, model.{attribute}"
    found = f"{model!r:.80}" if isinstance(model, str) else f"a {type(model).__name__}"
    return f"{found} is no transformers model; load one by AutoModelForCausalLM.from_pretrained"


def _adapters(model: PreTrainedModel) -> str | None:
    is_adapted = getattr(model, "_hf_peft_config_loaded", False) or any(
        type(module).__module__.partition(".")[0] == "peft" for module in model.modules()
    )
    return "it has adapters that are not merged; merge them, or load it without" if is_adapted else None


def _quantization(model: PreTrainedModel) -> str | None:
    configurations = (model.config, model.config.get_text_config())
    is_quantized = getattr(model, "hf_quantizer", None) is not None or any(
        getattr(configuration, "quantization_config", None) for configuration in configurations
    )
    return "it is quantized already; load the original in 16 bit or more" if is_quantized else None


def _dispatch(model: PreTrainedModel) -> str | None:
    """Why a model cannot be saved whole, or not be put back to where it was."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    instead = "load it without device_map, or on one device"
    missing = next((name for name, tensor in tensors.items() if tensor.device.type == "meta"), None)
    if missing is not None:
        return f"{missing} is not in memory (device meta), as in a model that is offloaded; {instead}"
    if any(getattr(module, "_hf_hook", None) is not None for module in model.modules()):
        return f"accelerate moves its layers between devices while it runs; {instead}"
    devices = sorted({str(tensor.device) for tensor in tensors.values()})
    return f"it is spread over {', '.join(devices)}; {instead}" if len(devices) > 1 else None


def _tensors(model: PreTrainedModel) -> str | None:
    for name, parameter in model.named_parameters():
        if type(parameter) is not nn.Parameter:
            return f"{name} is a {type(parameter).__name__}, not a plain parameter; load the original"
        if parameter.dtype not in _DTYPES:
            return f"{name} is {_name(parameter.dtype)}; load the original in {', '.join(map(_name, _DTYPES[:3]))}"
    for name, module in model.named_modules():
        if nn.utils.parametrize.is_parametrized(module):
            return f"{name} is parametrized; remove that first: torch.nn.utils.parametrize.remove_parametrizations"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_tokenizer(tokenizer: object) -> None:
    """Refuse what is no tokenizer of transformers.

    Raises:
        ConfigurationError: If that is so.
    """
    if tokenizer is None or isinstance(tokenizer, PreTrainedTokenizerBase):
        return
    found = f"{tokenizer!r:.80}" if isinstance(tokenizer, str) else f"a {type(tokenizer).__name__}"
    message = f"{found} is no tokenizer of transformers; load one by AutoTokenizer.from_pretrained"
    if isinstance(getattr(tokenizer, "tokenizer", None), PreTrainedTokenizerBase):
        message = f"{found} is a processor; give its tokenizer, processor.tokenizer"
    raise ConfigurationError("tokenizer", message)


def check_finite(model: PreTrainedModel) -> None:
    """Refuse a calibrated model whose values its dtype does not hold.

    Raises:
        CalibrationError: If a value is infinite or not a number; it names the tensor.
    """
    for name, parameter in model.named_parameters():
        if not _is_finite(parameter):
            message = f"{name} holds a calibrated value that {_name(parameter.dtype)} does not; give the model in"
            raise CalibrationError(f"{message} bfloat16 or float32")


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
