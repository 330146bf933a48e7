"""What is in memory during a calibration: one block, or one window, and nothing of those before it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from omniquant_pl.callbacks import CheckpointCallback, ExportCallback, KeepBestState, MetricsCallback, NumericsGuard
from omniquant_pl.checkpoint import SourceModel
from omniquant_pl.hooks import CalibrationCallback
from omniquant_pl.memory import make_room, return_free_memory
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.spec import ActivationSpec, TransformSpec, WindowSpec
from omniquant_pl.trainer import SequentialTrainer


@pytest.fixture
def living(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """Counts the blocks that are in memory. Nothing collects what holds itself: that takes long, block after block."""
    made: list[weakref.ref[nn.Module]] = []
    make = SourceModel.make_block

    def make_block(source: SourceModel, index: int, tensors: Mapping[str, Tensor]) -> nn.Module:
        block = make(source, index, tensors)
        made.append(weakref.ref(block))
        return block

    monkeypatch.setattr(SourceModel, "make_block", make_block)
    gc.disable()
    yield lambda: sum(block() is not None for block in made)
    gc.enable()


class Census(CalibrationCallback):
    """Counts living blocks where a block comes and where all have gone."""

    def __init__(self, living: Callable[[], int]) -> None:
        self._living = living
        self.counts: list[int] = []

    def on_evaluation_start(self, *_: Any) -> None:
        self.counts.append(self._living())

    def on_block_start(self, *_: Any) -> None:
        self.counts.append(self._living())

    def on_calibration_end(self, *_: Any) -> None:
        self.counts.append(self._living())


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        ({"activations": ActivationSpec(bits=4), "transform": TransformSpec()}, 1),
        ({"rounding": "learned", "aug_loss": True, "output_loss": "kl"}, 1),
        ({"rounding": "gptq"}, 1),
        ({"window": WindowSpec(blocks=2)}, 2),
    ],
    ids=["w4a4", "learned", "gptq", "windows"],
)
def test_blocks_go_when_they_are_done(
    make_llama: Callable[..., Path],
    fit: Callable[..., SequentialTrainer],
    living: Callable[[], int],
    settings: dict[str, Any],
    most: int,
) -> None:
    census = Census(living)
    callbacks = [KeepBestState(), MetricsCallback(), NumericsGuard(), CheckpointCallback(every_n_steps=2)]
    model = OmniQuantModel(str(make_llama(num_hidden_layers=4)), **settings)
    fit(model, [*callbacks, ExportCallback(), census], {"batch_size": 3})
    assert census.counts[0] == 0  # full precision
    assert max(census.counts[1:-3]) == most
    assert census.counts[-3:] == [0, 0, 0]
    assert living() == 0


def test_memory_is_given_back_at_any_time() -> None:
    class Ring:
        def __init__(self) -> None:
            self.self = self

    ring = weakref.ref(Ring())
    return_free_memory()
    make_room()
    assert ring() is None
