"""Everything that a run has left, as the report needs it: read from its folder, so that a resumed run lacks nothing."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omniquant_pl.report.statistics import BlockStatistics
from omniquant_pl.run.folder import RunFolder
from omniquant_pl.utils.files import write_json

__all__ = ["Record"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """The content of a run folder.

    Attributes:
        folder: The run folder.
        metrics: ``metrics.json``.
        config: ``config.yaml``, empty where there is none.
        statistics: What is kept of finished blocks, in order.
    """

    folder: Path
    metrics: Mapping[str, Any]
    config: str
    statistics: list[BlockStatistics]

    @staticmethod
    def read(folder: RunFolder) -> Record:
        """Read a run folder; what is missing or damaged is left out."""
        config = folder.config.read_text(encoding="utf-8") if folder.config.is_file() else ""
        metrics = folder.read_metrics()
        done = {block["index"] for block in metrics.get("blocks", [])}
        found = (_statistics(path) for path in sorted(folder.statistics.glob("*.json")))
        return Record(folder.path, metrics, config, [each for each in found if each is not None and each.index in done])

    @staticmethod
    def keep(folder: RunFolder, statistics: BlockStatistics) -> None:
        """Write what is to be known of a block into the run folder."""
        write_json(folder.statistics_file(statistics.index), asdict(statistics))

    @property
    def is_finished(self) -> bool:
        """Whether the calibrated model has been measured."""
        perplexity = self.metrics.get("perplexity", {})
        return bool(perplexity) and all("quantized" in values for values in perplexity.values())


def _statistics(path: Path) -> BlockStatistics | None:
    try:
        return BlockStatistics.read(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, AttributeError) as error:
        _log.warning("%s is damaged (%s); the report leaves it out", path, error)
        return None
