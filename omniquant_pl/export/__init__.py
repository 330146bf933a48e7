"""Formats that other programs load, one file each, and their verification in those programs."""

from omniquant_pl.export.folder import check_target
from omniquant_pl.export.format import Export, StorageDtype
from omniquant_pl.export.hf import HfExport
from omniquant_pl.export.hub import HubRepository
from omniquant_pl.export.registry import FORMATS, FormatName, formats_help, open_format
from omniquant_pl.export.runnable import open_runnable
from omniquant_pl.export.verification import Verification, check_agreement, verification_table

__all__ = [
    "FORMATS",
    "Export",
    "FormatName",
    "HfExport",
    "HubRepository",
    "StorageDtype",
    "Verification",
    "check_agreement",
    "check_target",
    "formats_help",
    "open_format",
    "open_runnable",
    "verification_table",
]
