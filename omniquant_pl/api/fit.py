"""A fit of the command line that is checked first and run later, and whose errors name arguments of Python."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from omniquant_pl.api.settings import nested
from omniquant_pl.cli.program import OmniQuantCLI, Parser, build, refusal_in
from omniquant_pl.data import CalibrationData
from omniquant_pl.errors import CalibrationError, ConfigurationError
from omniquant_pl.utils.presets import find_config

__all__ = ["WaitingFit", "prepare_fit"]

_FILE = "settings.yaml"
_PLACE = re.compile(rf"^.*{re.escape(_FILE)}, line \d+(, column \d+)?: ")
_ARGUMENTS = {"model.path": "model", "trainer.default_root_dir": "output"}
"""Arguments that settings of the command line are made of."""


class WaitingFit(OmniQuantCLI):
    """A fit whose settings are parsed, and whose model, data and trainer are made, but that has not begun."""

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        """Wait for :meth:`go`."""

    @property
    def data(self) -> CalibrationData:
        """The data that the settings ask for."""
        assert isinstance(self.datamodule, CalibrationData)
        return self.datamodule

    def go(self) -> None:
        """Run the fit.

        Raises:
            ConfigurationError: If something turns out not to work.
            CalibrationError: If the calibration diverges.
            KeyboardInterrupt: If it is interrupted twice.
        """
        with _errors_of_arguments():
            super()._run_subcommand("fit")


class _RaisingParser(Parser):
    """Raises what the command line writes."""

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise _of_file(self.explained(message)) from ex


class _SettingsDumper(yaml.SafeDumper):
    """Quotes every text, as a reader may take one such as 1e-3 for a number that this writer does not."""


_SettingsDumper.add_representer(
    str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"')
)


def prepare_fit(scheme: str | Path, settings: Mapping[str, Any]) -> WaitingFit:
    """Check a fit's settings without touching its model or its folder.

    Args:
        scheme: A preset's name, or the path of a configuration.
        settings: Further settings by their dotted keys.

    Returns:
        The fit.

    Raises:
        ConfigurationError: If there is no such scheme, or a setting is unknown or not accepted.
    """
    if not isinstance(scheme, str | Path):
        raise ConfigurationError("scheme", f"{scheme!r} is no name of a preset, such as 'w4a16g128', and no path")
    with _errors_of_arguments(), tempfile.TemporaryDirectory(prefix="omniquant-") as folder:
        path = Path(folder) / _FILE
        content = yaml.dump(nested(settings), Dumper=_SettingsDumper, allow_unicode=True, width=float("inf"))
        path.write_text(content, encoding="utf-8")
        fit = build(["fit", f"--config={_find(scheme)}", f"--config={path}"], WaitingFit, _RaisingParser)
    _check_read_as_given(fit, settings)
    processes = fit.trainer.num_devices * fit.trainer.num_nodes
    if processes > 1:
        message = f"trainer: {processes} processes are asked for, and quantize() works in the one that calls it"
        raise ConfigurationError("settings", f"{message}; leave out devices and num_nodes")
    return fit


def _find(scheme: str | Path) -> str:
    try:
        return find_config(str(scheme))
    except ConfigurationError as error:
        raise ConfigurationError("scheme", str(error).removeprefix(f"{error.key}: ")) from error


def _check_read_as_given(fit: WaitingFit, settings: Mapping[str, Any]) -> None:
    """Refuse texts that a reader of YAML takes for null where a setting may be a text or null."""
    for key, value in settings.items():
        if isinstance(value, str) and fit.config["fit"].get(key) is None:
            message = f"{key}: the text {value!r} would be read as null; give None for that, or ./{value} for a path"
            raise ConfigurationError("settings", message)


@contextmanager
def _errors_of_arguments() -> Iterator[None]:
    """Raise what a person can mend under the name of the argument that it came by."""
    try:
        yield
    except MisconfigurationException as error:
        raise ConfigurationError("settings", f"trainer: {error}") from error
    except SystemExit as error:  # Lightning ends the process at a second interruption
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise
    except (ValueError, CalibrationError) as error:
        refusal = refusal_in(error)
        if refusal is None:
            raise
        raise _renamed(refusal) from error


def _renamed(refusal: ConfigurationError | CalibrationError) -> ConfigurationError | CalibrationError:
    if not isinstance(refusal, ConfigurationError):
        return refusal
    message = str(refusal).removeprefix(f"{refusal.key}: ")
    if refusal.key == "--config":
        return _of_file(message)
    return ConfigurationError(_ARGUMENTS.get(refusal.key, refusal.key), message)


def _of_file(message: str) -> ConfigurationError:
    """Return the error for a line of the settings, or of the scheme where it names another file."""
    own = _PLACE.sub("", message)
    is_of_settings = own != message or not re.match(r"[^:]+, line \d+", message)
    return ConfigurationError("settings" if is_of_settings else "scheme", own)
