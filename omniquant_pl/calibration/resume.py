"""What an interrupted run has left: blocks that are finished, and the state of a window that was not folded yet."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from omniquant_pl.blocks.quantized_block import QuantizedBlock
from omniquant_pl.calibration.hooks import BlockResult
from omniquant_pl.errors import ConfigurationError
from omniquant_pl.run.checkpoints import GuardedCheckpointIO, load_latest
from omniquant_pl.run.fingerprint import differing_parts
from omniquant_pl.run.folder import RunFolder
from omniquant_pl.spec import WindowSpec

__all__ = ["ResumeState"]

_log = logging.getLogger(__name__)


class ResumeState:
    """Reads and writes what a run can go on from.

    Args:
        folder: The run.
        fingerprint: What this calibration belongs to.
        resumes: Whether anything that is there counts.
        force: Go on although the run belongs to something else, with a warning.
    """

    def __init__(self, folder: RunFolder, fingerprint: Mapping[str, str], resumes: bool, force: bool = False) -> None:
        self.fingerprint = dict(fingerprint)
        self._folder = folder
        self._resumes = resumes
        self._force = force
        metrics = folder.read_metrics() if resumes else {}
        self._known = _results(metrics) if force or metrics.get("fingerprint") == self.fingerprint else {}
        self._loaded: tuple[int, dict[str, Tensor], dict[str, Any]] | None = None

    def check_same_calibration(self, blocks: int, checkpoint: Path) -> None:
        """Refuse a run that has calibrated something else.

        Args:
            blocks: Number of blocks.
            checkpoint: The state inside a block that is to be gone on from.

        Raises:
            ConfigurationError: It names what differs.
        """
        if not self._resumes:
            return
        contents = (self._folder.block_content(index) for index in range(blocks))
        first = next((content for content in contents if content is not None), None)
        if first is not None:
            self._check_same_calibration(first, str(self._folder.blocks))
        load_latest(checkpoint, lambda content: self._is_ours(content, str(checkpoint)))

    def _check_same_calibration(self, content: Mapping[str, Any], origin: str) -> None:
        differing = differing_parts(self.fingerprint, content.get("fingerprint", {}))
        if not differing:
            return
        message = f"{origin} belongs to a calibration with other {' and '.join(differing)}"
        if not self._force:
            how = "choose another folder, or set checkpoint.force to true to go on all the same"
            raise ConfigurationError("ckpt_path", f"{message}; {how}")
        _log.warning("%s; it counts all the same, as checkpoint.force says", message)

    def _is_ours(self, checkpoint: Mapping[str, Any], origin: str) -> bool:
        self._check_same_calibration(checkpoint.get("calibration", {}), origin)
        return True

    def load(self, index: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return factors of a finished block and what is known of it; ``None`` if it has to be calibrated.

        A damaged file is reported in the log, and its block is calibrated again.
        """
        if not self._resumes:
            return None
        if self._loaded is not None and self._loaded[0] == index:
            return self._loaded[1:]
        try:
            factors, content = self._folder.load_block(index)
        except ConfigurationError as error:
            if self._folder.factor_file(index).is_file():
                _log.warning("%s; the block is calibrated again", error)
            return None
        if content is None:
            path = self._folder.factor_file(index)
            _log.warning("%s does not say what it belongs to; the block is calibrated again", path)
            return None
        if differing_parts(self.fingerprint, content.get("fingerprint", {})) and not self._force:
            _log.warning("%s belongs to another calibration; it is done again", self._folder.factor_file(index))
            return None
        self._loaded = (index, factors, content)
        return factors, content

    def is_done(self, blocks: range) -> bool:
        """Return whether blocks are finished and measured."""
        return all(self.load(index) is not None and self.result(index) is not None for index in blocks)

    def result(self, index: int) -> BlockResult | None:
        """Return what has been measured of a finished block, ``None`` if it was not written down."""
        return self._known.get(index)

    def first_unfinished(self, index: int, blocks: range, window: WindowSpec) -> int:
        """Return where the calibration goes on, from a block on.

        Windows that overlap start where they would have started: blocks that were folded in the middle of an advance
        are calibrated again.

        Args:
            index: The first block that is asked for.
            blocks: All blocks that are calibrated one after the other.
            window: How many learn together.
        """
        end = index
        while end < blocks.stop and self.load(end) is not None:
            end += 1
        if end in (index, blocks.stop) or window.blocks == 1:
            return end
        last_start = max(0, -(-(len(blocks) - window.blocks) // window.stride) * window.stride)
        return max(index, blocks.start + min((end - blocks.start) // window.stride * window.stride, last_start))

    def save_window(self, blocks: Sequence[QuantizedBlock]) -> None:
        """Keep what blocks have learned that are not folded yet, before those in front of them are.

        Until those are, a calibration goes on from the window before, which therefore stays however often this is done.
        """
        content = {
            "fingerprint": self.fingerprint,
            "first": blocks[0].index,
            "blocks": [
                {"state": block.factors.state_dict(), "loss_initial": block.loss_initial, "epochs": block.epochs}
                for block in blocks
            ],
        }
        checkpoints = GuardedCheckpointIO(lambda last: bool(last["calibration"]["first"] != content["first"]))
        checkpoints.save_checkpoint({"calibration": content}, self._folder.window)

    def _is_window(self, content: Mapping[str, Any], first: int) -> bool:
        is_ours = not differing_parts(self.fingerprint, content["fingerprint"])
        return content["first"] == first and (is_ours or self._force)

    def restore_window(self, first: int, blocks: range, window: WindowSpec) -> Callable[[QuantizedBlock], None]:
        """Return what gives blocks back what they have learned in the window before the one that starts there."""
        if not self._resumes or first == blocks.start or window.stride == window.blocks:
            return lambda block: None
        found = load_latest(self._folder.window, lambda content: self._is_window(content["calibration"], first))
        states = [] if found is None else found[1]["calibration"]["blocks"]
        if not states and first < blocks.stop:
            _log.warning("what blocks from %d on had learned with those before is lost; they start again", first)

        def restore(block: QuantizedBlock) -> None:
            position = block.index - first
            if position < len(states):
                state = states[position]
                block.factors.load_state_dict(state["state"])
                block.loss_initial, block.epochs = state["loss_initial"], state["epochs"]

        return restore


def _results(metrics: Mapping[str, Any]) -> dict[int, BlockResult]:
    """Read the results of blocks in ``metrics.json``; one that is not as it should be is measured again."""
    names = {field.name for field in fields(BlockResult)}
    entries = [entry for entry in metrics.get("blocks", []) if isinstance(entry, dict) and set(entry) == names]
    return {entry["index"]: BlockResult(**entry) for entry in entries}
