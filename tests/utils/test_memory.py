"""What is in memory during a calibration: one block, or one window, and nothing of those before it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from omniquant_pl.calibration.engine import hidden_state_count
from omniquant_pl.calibration.hooks import CalibrationCallback
from omniquant_pl.callbacks import CheckpointCallback, ExportCallback, KeepBestState, MetricsCallback, NumericsGuard
from omniquant_pl.checkpoint import SourceModel
from omniquant_pl.hidden_states import HiddenStates, Storage
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.spec import ActivationSpec, ObjectiveSpec, RoundingSpec, TransformSpec, WindowSpec
from omniquant_pl.trainer import SequentialTrainer
from omniquant_pl.utils.memory import make_room, return_free_memory


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
    """Counts what lives where a block comes and where all have gone."""

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
        ({"rounding": RoundingSpec("learned"), "objective": ObjectiveSpec(True, "kl")}, 1),
        ({"rounding": RoundingSpec("gptq")}, 1),
        ({"objective": ObjectiveSpec(window=WindowSpec(blocks=2))}, 2),
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


class HiddenStatePair:
    """Counts the streams that are in memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._made: list[weakref.ref[HiddenStates]] = []
        self.most = 0
        empty = Storage.empty

        def count(storage: Storage, shape: torch.Size) -> HiddenStates:
            stream = empty(storage, shape)
            self._made.append(weakref.ref(stream))
            self.most = max(self.most, self.count())
            return stream

        monkeypatch.setattr(Storage, "empty", count)

    def count(self) -> int:
        """How many there are."""
        return sum(stream() is not None for stream in self._made)


@pytest.mark.parametrize("window", [WindowSpec(1, 1), WindowSpec(2, 1), WindowSpec(2, 2)], ids=["1", "2", "2-2"])
@pytest.mark.parametrize("aug_loss", [False, True], ids=["", "aug"])
def test_streams_are_as_many_as_room_is_made_for_and_gone_before_the_evaluation(
    make_llama: Callable[..., Path],
    fit: Callable[..., SequentialTrainer],
    monkeypatch: pytest.MonkeyPatch,
    window: WindowSpec,
    aug_loss: bool,
) -> None:
    streams = HiddenStatePair(monkeypatch)
    census = Census(streams.count)
    model = OmniQuantModel(str(make_llama(num_hidden_layers=4)), objective=ObjectiveSpec(aug_loss, window=window))
    gc.disable()
    try:
        fit(model, [MetricsCallback(), census], {"batch_size": 3})
    finally:
        gc.enable()
    assert streams.most == hidden_state_count(window.blocks)
    assert census.counts[0] == 0
    assert census.counts[-3:] == [0, 0, 0]


@pytest.mark.parametrize("loss", ["mse", "kl"])
def test_embedding_and_head_are_on_the_device_while_they_are_needed(
    llama: Path, fit: Callable[..., SequentialTrainer], monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    """Whatever runs them finds them there, and no block learns beside them unless its loss needs the head."""
    places, learned = ["cpu"], []
    model = OmniQuantModel(str(llama), objective=ObjectiveSpec(output_loss=loss))
    model.source.verify()  # opened: it is tried once on the CPU
    on = SourceModel.on

    @contextmanager
    def moved(source: SourceModel, device: torch.device) -> Iterator[None]:
        with on(source, device):
            places.append("device")
            yield
            places.pop()

    monkeypatch.setattr(SourceModel, "on", moved)
    for name in ("calls", "embed", "logits"):
        run = getattr(SourceModel, name)

        def found(*arguments: Any, run: Any = run) -> Any:
            assert places[-1] == "device"
            return run(*arguments)

        monkeypatch.setattr(SourceModel, name, found)

    class Watch(Callback):
        def on_train_start(self, *_: Any) -> None:
            learned.append(places[-1])

    fit(
        model,
        [MetricsCallback(), Watch()],
        {"batch_size": 3},
    )
    assert learned == ["cpu", "device" if loss == "kl" else "cpu"]
    assert places == ["cpu"]


def test_memory_is_given_back_at_any_time() -> None:
    class Ring:
        def __init__(self) -> None:
            self.self = self

    ring = weakref.ref(Ring())
    return_free_memory()
    make_room()
    assert ring() is None
