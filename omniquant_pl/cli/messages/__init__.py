"""What a person gets for a mistake on the command line or in a file: one line, with what would be right."""

from omniquant_pl.cli.messages.asked import Asked
from omniquant_pl.cli.messages.config_file import check_config_file
from omniquant_pl.cli.messages.explain import explain
from omniquant_pl.cli.messages.no_run import fit_first
from omniquant_pl.cli.messages.places import check_nulls, check_sections

__all__ = ["Asked", "check_config_file", "check_nulls", "check_sections", "explain", "fit_first"]
