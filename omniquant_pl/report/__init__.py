"""`report.html`: what a run has measured and learned, as one page of pictures and numbers."""

from omniquant_pl.report.page import write_report
from omniquant_pl.report.record import Record
from omniquant_pl.report.statistics import BlockStatistics, block_statistics

__all__ = ["BlockStatistics", "Record", "block_statistics", "write_report"]
