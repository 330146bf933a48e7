"""The learned factors of a whole run in one small file, for others to start from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from omniquant_pl.checkpoint import SourceModel
from omniquant_pl.errors import ConfigurationError
from omniquant_pl.initialization.origin import check_rotation, rotation_of, warn_of_another_model
from omniquant_pl.run.fingerprint import model_digest
from omniquant_pl.run.folder import RunFolder
from omniquant_pl.utils.sealed import DamagedFileError, read_sealed, write_sealed

__all__ = ["FACTOR_FILE", "FactorFile", "write_factor_file"]

FACTOR_FILE = "factors.safetensors"
_KIND = "omniquant factors"


def write_factor_file(path: Path, run: RunFolder, source: SourceModel, content: Mapping[str, Any]) -> None:
    """Write the factors of a finished run, named ``<block>.<factor>``, and what they belong to.

    Args:
        path: The file to create or replace.
        run: The run.
        source: Its model.
        content: What else to say: the model's name and the scheme.

    Raises:
        ConfigurationError: If the run is not finished or is damaged.
    """
    factors = {
        f"{index}.{name}": factor for index in range(len(source)) for name, factor in run.load_factors(index).items()
    }
    known = (run.block_content(0) or {}).get("fingerprint", {})
    head = {
        "kind": _KIND,
        "blocks": len(source),
        "rotation": rotation_of(source),
        "fingerprint": {**known, "model": model_digest(source.folder)},
    }
    write_sealed(path, factors, {**content, **head})


class FactorFile:
    """A file of :func:`write_factor_file`. One of another model is warned of: it is meant where one was tuned from it.

    Args:
        path: The file.
        source: The model that starts from its factors.

    Raises:
        ConfigurationError: If it cannot be read, holds something else, or factors for another rotation or depth.
    """

    def __init__(self, path: Path, source: SourceModel) -> None:
        self._path = path
        self._tensors, content = _read(path)
        if content["blocks"] != len(source):
            message = f"{path} has factors of {content['blocks']} blocks, the model has {len(source)}"
            raise ConfigurationError("model.parameters", message)
        check_rotation(path, content["rotation"], source)
        if content["fingerprint"]["model"] != model_digest(source.folder):
            warn_of_another_model(path, content.get("model"), source)

    def origin(self, index: int) -> str:
        """Say where a block's factors are from."""
        return f"{self._path}, block {index},"

    def load(self, index: int) -> dict[str, Tensor]:
        """Return one block's factors by name."""
        prefix = f"{index}."
        return {name.removeprefix(prefix): found for name, found in self._tensors.items() if name.startswith(prefix)}


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        tensors, content = read_sealed(path)
    except FileNotFoundError as error:
        raise ConfigurationError("model.parameters", f"there is no file {path}") from error
    except DamagedFileError as error:
        raise ConfigurationError("model.parameters", str(error)) from error
    if content is None or content.get("kind") != _KIND:
        message = f"{path} holds no factors; python train.py export --format factors writes such a file"
        raise ConfigurationError("model.parameters", message)
    return tensors, content
