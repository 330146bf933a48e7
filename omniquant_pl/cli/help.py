"""What ``--help`` says beside the settings' own words: own settings first, Lightning's many behind them."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omniquant_pl.export import formats_help

__all__ = ["descriptions", "own_settings_first", "reword"]

_PROGRAM = "Calibrate, measure, export and run quantized language models."

_FIT = (
    "Calibrate a model block by block, measure it and export it. Settings come from presets and files (--config, the "
    "later one wins) and from flags: --model.weights.bits 3 is model: {weights: {bits: 3}} in a file, and null turns "
    "off what can be turned off. --print_config shows the result. Settings of the trainer that most people need: "
    "trainer.max_epochs, trainer.default_root_dir (the run folder), trainer.accelerator, trainer.precision "
    "(32-true or bf16-mixed)."
)

_WORDS = {
    "--ckpt_path": "last: go on with the run in the run folder where it was interrupted, or start it if there is none. "
    "Or the path of a checkpoint inside a block",
    "--seed_everything": "Seed of everything random: windows of text, their order, signs of rotations excepted",
    "--weights_only": "Not used: checkpoints are always read without running code",
}


def descriptions(commands: Iterable[str]) -> dict[str, Any]:
    """Return what the parsers of the program and of its commands say of themselves, as LightningCLI takes it."""
    program = Path(sys.argv[0]).name
    usages = {
        command: {"usage": f"{program} {command} [--config FILE] [--SECTION.KEY VALUE ...]"} for command in commands
    }
    return {"description": _PROGRAM, **usages, "fit": {**usages["fit"], "description": _FIT}}


def reword(parser: ArgumentParser) -> None:
    """Say of Lightning's flags what they do here, and of formats what each class says of itself."""
    formats = formats_help()
    own = {"--format": formats, "--export.format": f"{formats}; null exports nothing"}
    for flag, words in (_WORDS | own).items():
        if flag in parser._option_string_actions:
            parser._option_string_actions[flag].help = words


def own_settings_first(parser: ArgumentParser) -> None:
    """Move the trainer's settings, most of which nobody needs, to the end."""
    parser._action_groups.sort(
        key=lambda group: any(action.dest.startswith("trainer") for action in group._group_actions)
    )
