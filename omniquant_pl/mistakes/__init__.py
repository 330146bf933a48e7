"""What a person gets for a mistake on the command line or in a file: one line, with what would be right."""

from omniquant_pl.mistakes.asked import Asked
from omniquant_pl.mistakes.config_file import check_config_file
from omniquant_pl.mistakes.devices import devices_here
from omniquant_pl.mistakes.explain import explain
from omniquant_pl.mistakes.no_run import fit_first
from omniquant_pl.mistakes.values import PRECISIONS

__all__ = ["PRECISIONS", "Asked", "check_config_file", "devices_here", "explain", "fit_first"]
