"""The command line: ``fit``, ``test``, ``export``, ``generate``, ``compare``, ``plan``, over Lightning's own."""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
import warnings
import zipfile
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from jsonargparse import set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from safetensors import SafetensorError
from typing_extensions import override

from omniquant_pl.callbacks import (
    CheckpointCallback,
    ExportCallback,
    FoldCallback,
    MetricsCallback,
    NumericsGuard,
    ProgressCallback,
    ReportCallback,
    SaveConfig,
)
from omniquant_pl.cli.help import descriptions, own_settings_first, reword
from omniquant_pl.cli.messages import Asked, check_config_file, check_nulls, check_sections, explain, fit_first
from omniquant_pl.commands.command_trainer import CommandTrainer
from omniquant_pl.data import CalibrationData
from omniquant_pl.distributed import RemoteRankError
from omniquant_pl.errors import CalibrationError, ConfigurationError
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.run.checkpoints import previous_of
from omniquant_pl.trainer.checks import require_single_process
from omniquant_pl.utils.presets import find_config
from omniquant_pl.utils.signals import Interrupted, requeue

__all__ = ["OmniQuantCLI", "Parser", "build", "main", "quieten", "refusal_in", "run"]

_TRAINER_DEFAULTS: dict[str, Any] = {
    "max_epochs": 20,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,
    "devices": 1,
}


_asked: ContextVar[Asked] = ContextVar("asked")
"""The command line that is parsed: parsers of classes inside it know neither their key nor their command."""


class Parser(LightningArgumentParser):
    """Says what is wrong in a line, without the page of usage before it."""

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        parser = _asked.get().parser or self
        command = parser.prog.replace(" [options]", "")
        self.exit(2, f"error: {self.explained(message)}\nsee: {command} --help\n")

    @staticmethod
    def explained(message: str) -> str:
        """Return what is wrong with the arguments in one line, for what the parser says of them."""
        return explain(message, _asked.get())

    @override
    def format_help(self, formatter: argparse.HelpFormatter | None = None) -> str:
        own_settings_first(self)
        return super().format_help(formatter)

    @override
    def add_method_arguments(self, *arguments: Any, **options: Any) -> Any:
        # A group for them would have the method's name, and there is an export section besides.
        return super().add_method_arguments(*arguments, **{**options, "as_group": False})


class OmniQuantCLI(LightningCLI):
    """LightningCLI with the subcommands that this project has.

    Args:
        args: What follows the program's name; ``None`` takes the process's own.
        options: As :class:`LightningCLI`.
    """

    trainer: CommandTrainer

    def __init__(self, *, args: ArgsType = None, **options: Any) -> None:
        words = args if isinstance(args, list) else sys.argv[1:]
        self._named = [name for name in self.subcommands() if name in words] or list(self.subcommands())
        super().__init__(args=args, **options)

    @override
    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **options: Any) -> LightningArgumentParser:
        # Reading every signature and docstring takes most of a second for each subcommand.
        if subcommand not in self._named:
            return self.init_parser(**options)
        parser = super()._prepare_subcommand_parser(klass, subcommand, **options)
        if subcommand != "fit":  # the configuration of a run carries what its fit took
            for flag in ("--ckpt_path", "--weights_only"):
                parser.add_argument(flag, default=None, help=argparse.SUPPRESS)
        reword(parser)
        return parser

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"},
            "test": {"model", "datamodule"},
            "export": {"model", "datamodule"},
            "generate": {"model", "datamodule"},
            "compare": {"model", "datamodule"},
            "plan": {"model", "datamodule"},
        }

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        if args is not None and not isinstance(args, list):
            raise TypeError("arguments are a list of strings, as on a command line")
        given = sys.argv[1:] if args is None else args
        command = self._parser(self._named[0]) if len(self._named) < len(self.subcommands()) else None
        asked = Asked(given, Path(sys.argv[0]).name, list(self.subcommands()), command)
        _asked.set(asked)
        arguments = _with_config_paths(given)
        check_sections(asked)
        self.config = parser.parse_args(arguments)
        check_nulls(self.config[self.config.subcommand], asked)

    @override
    def _parse_ckpt_path(self) -> None:
        # Lightning would read settings in it; there are none, and it loads whatever the file holds.
        path = Path(self.config[self.config.subcommand].get("ckpt_path") or "")
        if path.is_file() and not (zipfile.is_zipfile(path) or previous_of(path).is_file()):
            raise ConfigurationError(
                "ckpt_path", f"{path} is not a checkpoint; last goes on with the run in its folder"
            )

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(ProgressCallback, "progress")
        parser.add_lightning_class_args(ReportCallback, "report")
        parser.add_lightning_class_args(ExportCallback, "export")
        parser.add_lightning_class_args(NumericsGuard, "numerics")
        parser.add_lightning_class_args(CheckpointCallback, "checkpoint")

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        configured = [self._get(self.config_init, key) for key in self._parser(self.subcommand).callback_keys]
        config = {**self._get(self.config_init, "trainer"), **kwargs}
        # Ends are heard in reverse: measured first, then exported, reported, and shown.
        return self._instantiate_trainer(config, [*configured, MetricsCallback(), FoldCallback()])

    def before_fit(self) -> None:
        """Protect what another run has left in the folder; Lightning calls this before the fit.

        Raises:
            ConfigurationError: If the run folder holds the factors of a run with other settings.
        """
        config = self._settings("fit")
        if not (config.get("ckpt_path") and self.trainer.forces_resume):
            self.trainer.run_folder.check_same_settings(config, bool(config.get("ckpt_path")))

    def before_test(self) -> None:
        """Measure no run under settings that are not its own; Lightning calls this before the test.

        Raises:
            ConfigurationError: As :meth:`before_fit`, or if there is no run, nor an exported folder to measure.
        """
        if self.config["test"]["exported"] is None:
            self._check_run_exists()
        self._check_same_settings("test")

    def before_export(self) -> None:
        """Take no run for what other settings would have led to; Lightning calls this before the export.

        Raises:
            ConfigurationError: As :meth:`before_fit`, or if there is no run.
        """
        self._check_run_exists()
        self._check_same_settings("export")

    def before_generate(self) -> None:
        """Check the run, unless a packed folder is given; Lightning calls this before text is generated.

        Raises:
            ConfigurationError: As :meth:`before_fit`, or if there is no run, nor a packed folder.
        """
        self._require_single_process()
        if self.config["generate"]["packed"] is None:
            self._check_run_exists()
            self._check_same_settings("generate")

    def before_compare(self) -> None:
        """Hand on the configuration that each method's is made from; Lightning calls this before a comparison."""
        self._require_single_process()
        self.trainer.settings = self._settings("compare")

    def before_plan(self) -> None:
        """Plan in one process, whatever the number that the plan is for; Lightning calls this before a plan."""
        self._require_single_process()

    def _require_single_process(self) -> None:
        require_single_process(self.trainer)

    def _check_same_settings(self, subcommand: str) -> None:
        self._require_single_process()
        self.trainer.run_folder.check_same_settings(self._settings(subcommand))

    def _check_run_exists(self) -> None:
        run = self.trainer.run_folder
        if not (run.config.is_file() or run.blocks.is_dir()):
            raise ConfigurationError("trainer.default_root_dir", fit_first(run.path, _asked.get()))

    def _settings(self, subcommand: str) -> dict[str, Any]:
        """Return the resolved configuration, as it is written."""
        return dict(yaml.safe_load(self._parser(subcommand).dump(self.config[subcommand], skip_none=False)))


_CLI = TypeVar("_CLI", bound=OmniQuantCLI)


def _with_config_paths(arguments: list[str]) -> list[str]:
    result: list[str] = []
    for argument in arguments:
        flag, separator, value = argument.partition("=")
        if flag in ("--config", "-c") and separator:
            argument = f"{flag}={_config_file(value)}"
        elif result and result[-1] in ("--config", "-c"):
            argument = _config_file(argument)
        result.append(argument)
    return result


def _config_file(name: str) -> str:
    path = find_config(name)
    check_config_file(path)
    return path


def run(arguments: list[str] | None = None) -> OmniQuantCLI:
    """Run a command line.

    Args:
        arguments: What follows the program's name; ``None`` takes the process's own.
    """
    set_parsing_settings(
        docstring_parse_attribute_docstrings=True,  # what --help says of the fields of a dataclass
        add_print_completion_argument=True,
    )
    return build(arguments, OmniQuantCLI, Parser)


def build(arguments: list[str] | None, cli_class: type[_CLI], parser_class: type[Parser]) -> _CLI:
    """Parse a command line and make everything that it asks for.

    Args:
        arguments: What follows the program's name; ``None`` takes the process's own.
        cli_class: What runs the command, unless it is to wait.
        parser_class: What happens to mistakes.
    """
    return cli_class(
        model_class=OmniQuantModel,
        datamodule_class=CalibrationData,
        trainer_class=CommandTrainer,
        trainer_defaults=_TRAINER_DEFAULTS,
        save_config_callback=SaveConfig,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=2,
        auto_configure_optimizers=False,
        parser_class=parser_class,
        parser_kwargs={"allow_abbrev": False, **descriptions(OmniQuantCLI.subcommands())},
        args=arguments,
    )


def quieten() -> None:
    """Drop Lightning's messages that fire once a block or do not apply to calibration."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # It says which process has died before it ends the others.
    logging.getLogger("lightning.fabric.strategies.launchers.subprocess_script").setLevel(logging.INFO)
    for message in (
        ".*in eval mode at the start of training.*",
        ".*Experiment logs directory.*",
        ".*LeafSpec.*",
        ".*smaller than the logging interval.*",  # losses are logged once an epoch
        ".*sync_dist=True.*",  # they are means over the processes already
    ):
        warnings.filterwarnings("ignore", message=message)


def main() -> None:
    """Entry point of ``train.py`` and of the installed command."""
    quieten()
    try:
        run()
    except Interrupted as error:
        is_first = not rank_zero_only.rank  # type: ignore[attr-defined]
        if is_first:
            sys.stderr.write(f"{error}; go on with: {_command_to_go_on()}\n")
        sys.exit(0 if requeue(error, is_first=is_first) else 128 + error.signal_number)
    except RemoteRankError:
        sys.exit(2)
    except MisconfigurationException as error:
        sys.stderr.write(f"error: trainer: {error}\n")
        sys.exit(2)
    except (OSError, SafetensorError) as error:  # a full disk, a missing permission; finished files are whole
        sys.stderr.write(f"error: {error}\n")
        sys.exit(1)
    except (ValueError, CalibrationError) as error:
        refusal = refusal_in(error)
        if refusal is None:
            raise
        sys.stderr.write(f"error: {refusal}\n")
        sys.exit(2)


def _command_to_go_on() -> str:
    """Return the command line of this process, from the last checkpoint."""
    previous = ["", *sys.argv]
    arguments = [
        argument
        for argument, before in zip(sys.argv, previous, strict=False)
        if not argument.startswith("--ckpt_path") and before != "--ckpt_path"
    ]
    return shlex.join(["python", *arguments, "--ckpt_path=last"])


def refusal_in(error: BaseException | None) -> ConfigurationError | CalibrationError | None:
    """Find what a person can mend in an error; jsonargparse wraps it where a setting may also be null."""
    while error is not None and not isinstance(error, ConfigurationError | CalibrationError):
        error = error.__cause__
    return error
