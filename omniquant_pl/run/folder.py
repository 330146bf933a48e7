"""The folder that a run leaves behind: names of its files, and reading and writing them."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from omniquant_pl.checkpoint import from_any_folder
from omniquant_pl.errors import ConfigurationError
from omniquant_pl.hidden_states import HIDDEN_STATES_PREFIX
from omniquant_pl.run.checkpoints import previous_of
from omniquant_pl.run.settings import differing_settings
from omniquant_pl.utils.files import finite, write_json
from omniquant_pl.utils.sealed import DamagedFileError, read_sealed, write_sealed

__all__ = ["MADE_BY", "VARIANTS", "RunFolder", "is_export"]

_log = logging.getLogger(__name__)

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)

VARIANTS = ("full_precision", "round_to_nearest", "quantized")
"""The models whose perplexities ``metrics.json`` holds."""

MADE_BY = "Calibrated with omniquant-pl ("
"""What every model card says, of whatever release, and an exported folder is known by."""

_COMPARISON = "compare"
"""The folder of a comparison's fits, each a run of its own inside the run that they compare."""


def is_export(folder: Path) -> bool:
    """Return whether a folder was written by an export."""
    card = folder / "README.md"
    return card.is_file() and MADE_BY in card.read_text(encoding="utf-8", errors="replace")


class RunFolder:
    """Paths and files of one run.

    Args:
        path: ``trainer.default_root_dir``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.json"
        self.blocks = path / "blocks"
        self.model = path / "model"
        self.report = path / "report.html"
        self.statistics = path / "statistics"
        self.streams = path / "streams"
        self.checkpoint = path / "last.ckpt"
        self.window = path / "window.ckpt"
        self.segments = path / "segments"
        self.comparison = path / _COMPARISON

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes of this machine out; a killed process leaves no lock behind.

        Raises:
            ConfigurationError: If one is at work here, or this is inside another run's folder.
        """
        self._check_not_nested()
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in _NO_LOCKS:
                    _log.warning("%s is on a file system without locks; keep other processes out of it", self.path)
                    self._remove_parts()
                    yield
                    return
                if not isinstance(error, BlockingIOError):
                    raise
                message = f"another process is calibrating in {self.path}; choose another folder, or wait for it"
                raise ConfigurationError("trainer.default_root_dir", message) from error
            self._remove_parts()
            yield

    def _check_not_nested(self) -> None:
        path = self.path.resolve()
        for parent in path.parents:
            is_own = path.relative_to(parent).parts[0] == _COMPARISON
            if not is_own and (parent / ".lock").is_file() and (parent / "config.yaml").is_file():
                message = f"{self.path} is inside the folder of another run, {parent}; choose one beside it"
                raise ConfigurationError("trainer.default_root_dir", message)

    def _remove_parts(self) -> None:
        """Delete what a process that was killed had begun to write."""
        folders = (self.blocks, self.statistics, self.streams, self.segments)  # not those with locks of their own
        parts = [self.path.glob(".*.part"), *(folder.rglob(".*.part") for folder in folders)]
        streams = (folder.rglob(f"{HIDDEN_STATES_PREFIX}*") for folder in (self.streams, self.segments))
        for path in list(chain(*parts, *streams)):
            path.unlink(missing_ok=True)  # a plan is made without the lock

    def start(self) -> None:
        """Make room for a run: what an earlier one has left moves to ``previous/``, so that nothing gets mixed."""
        for streams in (self.streams, *self.segments.rglob(self.streams.name)):
            shutil.rmtree(streams, ignore_errors=True)
        results = (self.blocks, self.segments, self.model, self.metrics, self.report, self.statistics)
        self._keep_foreign_model()
        left = (*results, *self._checkpoints())
        found = [path for path in left if path.exists()]
        self._announce_start(found)
        moving = self.path / "previous.part"
        if any((moving / path.name).exists() for path in found):  # a start was killed, and another run was here since
            self._finish_start(moving)
        if found:
            moving.mkdir(exist_ok=True)
        for path in found:
            path.rename(moving / path.name)
        if moving.exists():
            self._finish_start(moving)

    def _announce_start(self, found: Sequence[Path]) -> None:
        """Say what moves where, and what is deleted, before it is."""
        if not found:
            return
        previous = self.path / "previous"
        names = ", ".join(path.name for path in found)
        deleted = f"; what {previous} holds, of the run before, is deleted" if previous.exists() else ""
        _log.warning("%s holds a run: %s move to %s%s", self.path, names, previous, deleted)

    def _keep_foreign_model(self) -> None:
        """Move a ``model`` that no export has written out of the way, for good."""
        if not self.model.exists() or is_export(self.model):
            return
        free = next(path for number in count(1) if not (path := self.path / f"model-{number}").exists())
        _log.warning("%s is none of this run's exports; it moves to %s, and stays there", self.model, free)
        self.model.rename(free)

    def _finish_start(self, moving: Path) -> None:
        previous = self.path / "previous"
        shutil.rmtree(previous, ignore_errors=True)
        moving.rename(previous)

    def keep_log(self) -> None:
        """Give the log of an interrupted run another name: the logger of the next one deletes what it finds."""
        path = self.path / "logs" / "metrics.csv"
        if path.is_file():
            number = sum(1 for _ in path.parent.glob("metrics-*.csv"))
            path.replace(path.with_name(f"metrics-{number + 1}.csv"))

    def segment_folders(self) -> list[RunFolder]:
        """Return the folders of segments that are not joined, and of what is stitched in them."""
        return [RunFolder(path) for pattern in ("*", "*/stitched") for path in sorted(self.segments.glob(pattern))]

    def _checkpoints(self) -> list[Path]:
        return [path for last in (self.checkpoint, self.window) for path in (last, previous_of(last))]

    def remove_checkpoints(self) -> None:
        """Delete what only an unfinished run needs."""
        for path in self._checkpoints():
            path.unlink(missing_ok=True)
        for log in sorted(self.segments.rglob("metrics*.csv")):
            name = "-".join(part for part in log.relative_to(self.segments).with_suffix("").parts if part != "logs")
            (self.path / "logs").mkdir(exist_ok=True)
            log.replace(self.path / "logs" / f"segment-{name}.csv")
        shutil.rmtree(self.segments, ignore_errors=True)

    def check_same_settings(self, config: Mapping[str, Any], resumes: bool = False) -> None:
        """Protect what a run with other settings has left here, and do not take it for these settings' own.

        Args:
            config: The resolved configuration of the run that is about to start, or to be measured.
            resumes: Whether what is here is to be gone on with, be it finished blocks or not.

        Raises:
            ConfigurationError: If factors are here that other settings have led to; it names those that differ.
        """
        blocks = chain(self.blocks.glob("*.safetensors"), self.segments.rglob("*.safetensors"))
        if not (self.config.is_file() and (resumes or any(blocks))):
            return
        saved = self.read_config()
        differing = differing_settings(_from_any_folder(saved), _from_any_folder(config))
        if differing:
            others = ", ".join(differing)
            message = f"{self.path} holds a run with another {others}; choose another folder or delete that one"
            raise ConfigurationError("trainer.default_root_dir", message)

    def read_config(self, key: str = "trainer.default_root_dir") -> dict[str, Any]:
        """Return the run's configuration, empty where it has none.

        Raises:
            ConfigurationError: If it is damaged; ``key`` is the setting that led here.
        """
        if not self.config.is_file():
            return {}
        try:
            return dict(yaml.safe_load(self.config.read_text(encoding="utf-8")))
        except (yaml.YAMLError, UnicodeDecodeError, TypeError, ValueError) as error:
            raise ConfigurationError(key, f"{self.config} is damaged: {error}") from error

    def factor_file(self, index: int) -> Path:
        """Return the file of one block's learned factors."""
        return self.blocks / f"{index:05d}.safetensors"

    def statistics_file(self, index: int) -> Path:
        """Return where what the report knows of a block is kept."""
        return self.statistics / f"{index:05d}.json"

    def save_factors(self, index: int, factors: Mapping[str, Tensor], content: Mapping[str, Any] | None = None) -> None:
        """Write one block's factors, whole or not at all.

        Args:
            index: Position of the block.
            factors: By the names that they have in files.
            content: What they belong to, and what is known of the block.
        """
        write_sealed(self.factor_file(index), factors, content or {})

    def load_factors(self, index: int, key: str = "trainer.default_root_dir") -> dict[str, Tensor]:
        """Read one block's factors.

        Raises:
            ConfigurationError: If the file is missing or damaged; ``key`` is the setting that led here.
        """
        return self.load_block(index, key)[0]

    def load_block(
        self, index: int, key: str = "trainer.default_root_dir"
    ) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
        """Read one block's factors and what they belong to, ``None`` of a file that does not say it.

        Raises:
            ConfigurationError: As :meth:`load_factors`.
        """
        path = self.factor_file(index)
        try:
            return read_sealed(path)
        except FileNotFoundError as error:
            message = f"{path} is missing; the run in {self.path} has not finished block {index}"
            raise ConfigurationError(key, message) from error
        except DamagedFileError as error:
            raise ConfigurationError(key, str(error)) from error

    def check_finished(self, blocks: int) -> None:
        """Refuse a run that lacks a block, without reading the others.

        Raises:
            ConfigurationError: It names the first file that is missing.
        """
        missing = (index for index in range(blocks) if not self.factor_file(index).is_file())
        for index in missing:
            self.load_factors(index)

    def block_content(self, index: int) -> dict[str, Any] | None:
        """Return what a block's factors belong to, ``None`` where there are none, or they are damaged."""
        try:
            return self.load_block(index)[1]
        except ConfigurationError:
            return None

    def write_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Replace ``metrics.json``."""
        write_json(self.metrics, {**metrics, "checksum": _checksum(metrics)})

    def add_metrics(self, sections: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
        """Put measurements into ``metrics.json``, beside those that are there.

        Args:
            sections: By section, name in it, and variant of the model.
        """
        metrics = self.read_metrics()
        for section, entries in sections.items():
            known = metrics.get(section, {})
            merged = {name: {**known.get(name, {}), **variants} for name, variants in entries.items()}
            metrics[section] = {**known, **merged}
        self.write_metrics(metrics)

    def read_metrics(self) -> dict[str, Any]:
        """Return the content of ``metrics.json``, empty where there is none, or a damaged one."""
        try:
            content = dict(json.loads(self.metrics.read_text(encoding="utf-8")))
            if content.pop("checksum", None) not in (None, _checksum(content)):
                raise ValueError("its checksum does not hold")
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError) as error:
            _log.warning("%s is damaged (%s); what it says is not known any more", self.metrics, error)
            return {}
        return content


def _from_any_folder(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a resolved configuration with the model's path as a run writes it."""
    model = config.get("model") or {}
    return {**config, "model": {**model, "path": from_any_folder(str(model.get("path") or ""))}}


def _checksum(metrics: Mapping[str, Any]) -> str:
    """SHA-256 of the numbers, whatever the spaces between them."""
    return hashlib.sha256(json.dumps(finite(metrics), sort_keys=True).encode()).hexdigest()
