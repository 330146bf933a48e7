"""The configurations that come with the package, by name."""

from __future__ import annotations

import difflib
from pathlib import Path

from omniquant_pl.errors import ConfigurationError

__all__ = ["find_config", "find_preset"]

_FOLDERS = tuple(folder / "configs" for folder in Path(__file__).parents[1:3])
_SUFFIXES = (".yaml", ".yml")
_LIKE = 0.65


def find_preset(name: str) -> Path | None:
    """Return the file of a preset such as ``w4a4``, ``w4a4.yaml`` or ``best/w4a4``, ``None`` if there is none."""
    file = f"{_stem(name)}.yaml"
    return next((folder / file for folder in _FOLDERS if (folder / file).is_file()), None)


def _presets() -> list[str]:
    """Return the names of all presets, such as ``w4a4`` and ``best/w4a4``."""
    return sorted({_stem(path.relative_to(f).as_posix()) for f in _FOLDERS for path in f.rglob("*.yaml")})


def find_config(name: str) -> str:
    """Return the path of a configuration; what is no file is looked up among the presets.

    Args:
        name: What was given to ``--config``, such as ``w4a4``, ``best/w4a4.yaml`` or ``./own.yaml``.

    Raises:
        ConfigurationError: If it is neither a file nor a preset.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return str(path)
    if name and path.is_dir():
        raise ConfigurationError("--config", _instead_of_folder(path))
    found = None if name.startswith(("/", ".", "~")) else find_preset(name)
    if found is None:
        raise ConfigurationError("--config", _not_there(name))
    return str(found)


def _stem(name: str) -> str:
    return next((name.removesuffix(suffix) for suffix in _SUFFIXES if name.endswith(suffix)), name)


def _instead_of_folder(path: Path) -> str:
    said = f"{path} is a folder, and a file is needed"
    if (path / "config.yaml").is_file():
        return f"{said}; did you mean the run's {path / 'config.yaml'}?"
    if find_preset(path.name) is not None:
        return f"{said}; did you mean the preset {_stem(path.name)}.yaml?"
    files = sorted(file.name for file in path.iterdir() if file.suffix in _SUFFIXES)[:3]
    return f"{said}; in it are {', '.join(files)}" if files else f"{said}; there is no configuration in it"


def _not_there(name: str) -> str:
    if not name or name.startswith("-"):
        return "the name of a file or of a preset is missing, such as --config w4a16g128.yaml"
    path = Path(name)
    if path.name == "config.yaml":  # of a run
        said = f"there is no file {name}, and so no run in {path.parent}"
        return f"{said}; fit calibrates one, with --trainer.default_root_dir {path.parent}"
    if name.startswith(("/", ".", "~")):
        return f"there is no file {name}"
    likely = _nearest(name)
    if likely:
        return f"there is no file {name}, and no preset of that name; did you mean {', '.join(likely)}?"
    plain = ", ".join(each for each in _presets() if "/" not in each)
    return f"there is no file {name}, and no preset of that name; presets: {plain}, and more in best/ and fast/"


def _nearest(name: str) -> list[str]:
    """Return the names of the three presets that are most like a name, fewer if not as many are alike."""
    wanted = _stem(name.lower()).removeprefix("configs/")
    scores = {each: _likeness(wanted, each) for each in _presets()}
    alike = [each for each, score in scores.items() if score >= _LIKE]
    return sorted(alike, key=lambda each: (-scores[each], each.count("/"), each))[:3]


def _likeness(wanted: str, preset: str) -> float:
    """From 0 to 1; the name counts, and a little the folder."""
    pairs = ((wanted, preset), (wanted.rpartition("/")[2], preset.rpartition("/")[2]))
    whole, last = (difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)
    return 0.9 * last + 0.1 * whole
