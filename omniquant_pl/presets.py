"""The configurations that come with the package, by name."""

from __future__ import annotations

from pathlib import Path

from omniquant_pl.errors import ConfigurationError

__all__ = ["find_config", "find_preset"]

_FOLDERS = (Path(__file__).parent / "configs", Path(__file__).parent.parent / "configs")


def find_preset(name: str) -> Path | None:
    """Returns the file of a preset such as ``w4a4.yaml`` or ``best/w4a4.yaml``, ``None`` if there is none."""
    return next((folder / name for folder in _FOLDERS if (folder / name).is_file()), None)


def find_config(name: str) -> str:
    """Returns the path of a configuration; a relative name is also looked up among the presets.

    Args:
        name: What was given to ``--config``, such as ``w4a4.yaml`` or ``best/w4a4.yaml``.

    Raises:
        ConfigurationError: If a bare name is neither a file nor a preset.
    """
    if Path(name).exists() or name.startswith(("/", ".", "~")):
        return name
    found = find_preset(name)
    if found is None and Path(name).name != name:
        return name
    if found is None:
        presets = sorted({str(path.relative_to(f)) for f in _FOLDERS for path in f.rglob("*.yaml")})
        raise ConfigurationError("--config", f"there is no file {name!r}; presets: {', '.join(presets)}")
    return str(found)
