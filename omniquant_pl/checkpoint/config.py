"""A model's ``config.json``: what it says, and transformers' configuration made of it.

transformers refuses a configuration by whatever its code runs into. All of that becomes one line that names the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig

from omniquant_pl.checkpoint.pointers import check_not_pointer
from omniquant_pl.checkpoint.reader import Checkpoint
from omniquant_pl.errors import ConfigurationError, one_line
from omniquant_pl.families import conversion_of, unknown_family

__all__ = ["ModelConfig", "blamed_on", "open_config"]

_DTYPES = ("float32", "float16", "bfloat16", "float64")
_LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_MEANINGS = {"Padding_idx must be within num_embeddings": "pad_token_id is not a token below vocab_size"}
"""What messages of torch's mean to a reader of the file."""
_NO_SIZES = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""What arithmetic with the values of a configuration raises where they are of other types or sizes than they should."""


@dataclass(frozen=True)
class ModelConfig:
    """What a model folder's ``config.json`` makes.

    Attributes:
        path: The file.
        content: What it says; in the words of the family that the checkpoint is opened as, if that is another.
        whole: transformers' configuration, of which that of the text may be a part.
        converted: The tensors as that other family names them; ``None`` where they are opened as they are.
    """

    path: Path
    content: dict[str, Any]
    whole: PretrainedConfig
    converted: Checkpoint | None

    @contextmanager
    def blamed(self, errors: type[Exception] | tuple[type[Exception], ...] = _NO_SIZES) -> Iterator[None]:
        """Report errors inside the block as faults of the file, as :func:`blamed_on` does."""
        with blamed_on(self.path, errors, self.content):
            yield


@contextmanager
def blamed_on(
    path: Path, errors: type[Exception] | tuple[type[Exception], ...], content: Mapping[str, Any] | None = None
) -> Iterator[None]:
    """Report errors inside the block as faults of a configuration file.

    Args:
        path: The file.
        errors: What counts; everything only around code of transformers' own.
        content: What the file says, to find the key of a value that transformers does not know.

    Raises:
        ConfigurationError: From the error, in one line.
    """
    try:
        yield
    except ConfigurationError:
        raise
    except errors as error:
        raise ConfigurationError("model.path", f"{path}: {_reason(error, content or {})}") from error


def _reason(error: Exception, content: Mapping[str, Any]) -> str:
    if isinstance(error, StrictDataclassError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # the error itself repeats the field and how it was checked
    if isinstance(error, KeyError) and error.args:
        key = _key_of(error.args[0], content)
        if key is not None:
            return f"{key} is {error.args[0]!r}, which transformers does not know"
        if isinstance(error.args[0], str) and " " in error.args[0]:  # a sentence, which str() would put into quotes
            return " ".join(error.args[0].split())
    message = " ".join(str(error).split())
    if message in _MEANINGS:
        return _MEANINGS[message]
    is_checked = isinstance(error, OSError | ValueError) or message.startswith("Field ")
    return message if is_checked else f"it makes no model: {one_line(error)}"


def _key_of(value: object, content: Mapping[str, Any]) -> str | None:
    """Return the dotted key under which a text stands, ``None`` if it does not."""
    for key, found in content.items():
        if isinstance(found, str) and found == value:
            return key
        if isinstance(found, Mapping) and (inside := _key_of(value, found)) is not None:
            return f"{key}.{inside}"
    return None


def open_config(folder: Path, trust_remote_code: bool = False) -> ModelConfig:
    """Read the configuration of a model folder.

    Args:
        folder: The folder.
        trust_remote_code: Whether code that comes with the checkpoint may run.

    Raises:
        ConfigurationError: If there is none, transformers cannot use it, or it is no unquantized causal language
            model's of a family that is known.
    """
    path = folder / "config.json"
    content = _read(path)
    _check_content(path, content)
    convert, checkpoint = conversion_of(content["model_type"]), None
    if convert is not None:
        stored = Checkpoint(folder)
        with blamed_on(path, _NO_SIZES, content):
            content, tensors = convert(content, stored.shapes())
        checkpoint = stored.view(tensors)
    with blamed_on(path, Exception, content):
        if checkpoint is not None:
            whole = AutoConfig.for_model(**content)
        else:
            whole = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        text = whole.get_text_config()
    if any(getattr(config, "quantization_config", None) for config in (whole, text)):
        raise ConfigurationError("model.path", f"{folder} is quantized already; give the original checkpoint")
    return ModelConfig(path, content, whole, checkpoint)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigurationError("model.path", f"{path.parent} has no config.json; it is not a model folder")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        check_not_pointer(path, "model.path")
        raise ConfigurationError("model.path", f"{path}: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise ConfigurationError("model.path", f"{path} holds a JSON {type(content).__name__}, not an object")
    return content


def _check_content(path: Path, content: dict[str, Any]) -> None:
    """Refuse what transformers refuses in other words than a reader of the file knows, or does not refuse at all."""
    family = content.get("model_type")
    if not isinstance(family, str) or not family:
        found = "has no model_type" if family is None else f"model_type is {family!r}"
        raise ConfigurationError("model.path", f"{path}: {found}; it names the model's family, for example 'llama'")
    unknown = unknown_family(family)
    if unknown is not None:
        raise ConfigurationError("model.path", f"{path}: {unknown}")
    _check_architectures(path, family, content.get("architectures"))
    _check_dtype(path, content)
    if content.get("quantization_config") is None:
        content.pop("quantization_config", None)
    elif not isinstance(content["quantization_config"], dict) or not content["quantization_config"]:
        message = f"quantization_config is {content['quantization_config']!r}, which describes no quantization"
        raise ConfigurationError("model.path", f"{path}: {message}; leave it out of the original checkpoint's")


def _check_architectures(path: Path, family: str, architectures: Any) -> None:
    """Refuse a model with a head of another kind, of a classifier or a reward model, which nobody trained to predict.

    A model without a head passes: where its embedding is tied it is whole, and where not the head is missed later.
    """
    names = [architectures] if isinstance(architectures, str) else architectures or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        message = f"architectures is {architectures!r}, not a list of class names such as 'LlamaForCausalLM'"
        raise ConfigurationError("model.path", f"{path}: {message}")
    headless = f"{family.replace('_', '')}model"
    if names and not any(name.endswith(_LANGUAGE_MODELS) or name.lower() == headless for name in names):
        message = f"{names[0]} is no causal language model; give a checkpoint whose architectures end in ForCausalLM"
        raise ConfigurationError("model.path", f"{path}: {message}")


def _check_dtype(path: Path, content: Mapping[str, Any]) -> None:
    for key in ("dtype", "torch_dtype"):
        dtype = content.get(key)
        if dtype is not None and dtype not in _DTYPES:
            message = f"{key} is {dtype!r}; it is one of {', '.join(_DTYPES)}, or is left out"
            raise ConfigurationError("model.path", f"{path}: {message}")
