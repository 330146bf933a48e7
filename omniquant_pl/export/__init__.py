"""Folders that other programs load, one format a file."""

from omniquant_pl.export.hf import HfExport

__all__ = ["HfExport"]
