"""The command line: parser, help, and messages."""

from omniquant_pl.cli.program import OmniQuantCLI, main, quieten, run

__all__ = ["OmniQuantCLI", "main", "quieten", "run"]
