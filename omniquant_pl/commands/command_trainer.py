"""The trainer of the command line: each subcommand is a method of its name, as LightningCLI calls it."""

from __future__ import annotations

from omniquant_pl.commands.compare import compare_methods
from omniquant_pl.commands.export import export_run
from omniquant_pl.commands.generate import generate_text
from omniquant_pl.commands.plan import plan_run
from omniquant_pl.commands.test import measure_run
from omniquant_pl.trainer import SequentialTrainer

__all__ = ["CommandTrainer"]


class CommandTrainer(SequentialTrainer):
    """Calibrates the blocks of a model in order, and works on finished runs."""

    test = measure_run  # type: ignore[assignment]
    export = export_run
    generate = generate_text
    compare = compare_methods
    plan = plan_run
