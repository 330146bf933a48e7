"""Gradients that are not finite: back, slower, and stop if that does not help."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping
from safetensors.torch import load_file

from omniquant_pl.blocks.module import BlockModule
from omniquant_pl.blocks.quantized_block import QuantizedBlock
from omniquant_pl.calibration.hooks import BlockResult, CalibrationCallback
from omniquant_pl.callbacks import NumericsGuard
from omniquant_pl.errors import CalibrationError
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.spec import ClippingSpec, LearningSpec, ScheduleSpec, TransformSpec
from omniquant_pl.trainer import SequentialTrainer

StorageTier = tuple[int, int, int]  # block, epoch as run (repeated ones count), step
PARAMETER = "blocks.0.factors.quantizers.self_attn/o_proj.upper"


class Poison(CalibrationCallback):
    """Spoils a gradient at some places, and records every epoch's start."""

    def __init__(self, places: Collection[StorageTier] | None, value: float = float("nan")) -> None:
        self.places = places
        self.value = value
        self.starts: list[list[dict[str, Any]]] = []
        self.results: list[BlockResult] = []

    def on_block_start(self, trainer: Any, block: QuantizedBlock) -> None:
        self.starts.append([])

    def on_train_epoch_start(self, trainer: Any, pl_module: BlockModule) -> None:
        optimizer = trainer.optimizers[0]
        state = {
            "factors": pl_module.state_dict(),
            "rates": {group["name"]: group["lr"] for group in optimizer.param_groups},
            "moments": optimizer.state_dict()["state"],
        }
        self.starts[-1].append(copy.deepcopy(state))
        self.step = 0

    def on_after_backward(self, trainer: Any, pl_module: BlockModule) -> None:
        place = (pl_module.index, len(self.starts[-1]) - 1, self.step)
        if self.places is None or place in self.places:
            pl_module.get_parameter(PARAMETER).grad[3] = self.value
        self.step += 1

    def on_block_end(self, trainer: Any, block: QuantizedBlock, result: BlockResult) -> None:
        self.results.append(result)


class Withhold(Callback):
    """Takes a gradient away in some steps, as of an expert that a batch does not reach."""

    def __init__(self, steps: Collection[int]) -> None:
        self.steps = steps

    def on_train_epoch_start(self, trainer: Any, pl_module: BlockModule) -> None:
        self.step = 0

    def on_after_backward(self, trainer: Any, pl_module: BlockModule) -> None:
        if self.step in self.steps:
            pl_module.get_parameter(PARAMETER).grad = None
        self.step += 1


def factors_in(trainer: SequentialTrainer) -> list[dict[str, torch.Tensor]]:
    return [load_file(path) for path in sorted(trainer.run_folder.blocks.iterdir())]


def assert_equal(first: Any, second: Any) -> None:
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.fixture
def calibrate(llama: Path, fit: Callable[..., SequentialTrainer], tmp_path: Path) -> Callable[..., SequentialTrainer]:
    def calibrate(name: str, *callbacks: Callback, epochs: int = 2, **options: Any) -> SequentialTrainer:
        model = OmniQuantModel(str(llama), clipping=ClippingSpec(lr=1e-2), transform=TransformSpec(lr=4e-3))
        return fit(model, callbacks, max_epochs=epochs, default_root_dir=tmp_path / name, **options)

    return calibrate


def test_a_healthy_run_is_left_alone(calibrate: Callable[..., SequentialTrainer]) -> None:
    guarded, plain = calibrate("a", NumericsGuard()), calibrate("b")
    assert_equal(factors_in(guarded), factors_in(plain))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_bad_step_takes_its_epoch_back(
    calibrate: Callable[..., SequentialTrainer], caplog: pytest.LogCaptureFixture, value: float
) -> None:
    poison = Poison({(1, 1, 2), (1, 1, 4)}, value)
    with caplog.at_level(logging.WARNING, logger="omniquant_pl.callbacks.numerics"):
        trainer = calibrate("bad", poison, NumericsGuard())
    first, bad, again = poison.starts[1]
    assert len(poison.starts[0]) == 2  # the other block has its epochs, no more
    assert_equal(again["factors"], bad["factors"])
    assert_equal(again["moments"], bad["moments"])
    assert first["rates"] == bad["rates"] == {"clipping": 1e-2, "transform": 4e-3}
    assert again["rates"] == {"clipping": 5e-3, "transform": 2e-3}
    for factors in factors_in(trainer):
        assert all(bool(torch.isfinite(factor).all()) for factor in factors.values())
    (warning,) = [record.getMessage() for record in caplog.records if "finite" in record.message]
    assert "block 1, epoch 1, step 2" in warning
    assert PARAMETER in warning
    assert [result.epochs for result in poison.results] == [2, 2]  # learned, not run


@pytest.mark.parametrize(("decay", "bad_epoch"), [("none", 0), ("linear", 0), ("cosine", 1), ("linear", 2)])
def test_an_epoch_taken_back_takes_its_part_of_the_schedule_back(
    llama: Path, fit: Callable[..., SequentialTrainer], decay: Any, bad_epoch: int
) -> None:
    """Its steps, and all after them, run at half of what the schedule has for them."""

    class Rates(Callback):
        def __init__(self) -> None:
            self.found: list[list[float]] = []

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.found.append([])

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            self.found[-1].append(optimizer.param_groups[0]["lr"])

    rates, poison, schedule = Rates(), Poison({(0, bad_epoch, 2)}), ScheduleSpec(0.25, decay)
    model = OmniQuantModel(str(llama), clipping=ClippingSpec(lr=1e-2), learning=LearningSpec(schedule))
    fit(model, [rates, poison, NumericsGuard()], max_epochs=3)
    planned = [1e-2 * schedule.factor(step, 18) for step in range(18)]
    halves, begin = [rate / 2 for rate in planned], 6 * bad_epoch
    assert rates.found[0] == pytest.approx(planned[: begin + 6] + halves[begin:])
    assert rates.found[1] == pytest.approx(planned)


@pytest.mark.parametrize("steps", [{0}, {0, 3}, {1, 2}])
def test_parameters_need_not_have_a_gradient_in_every_step(
    calibrate: Callable[..., SequentialTrainer], caplog: pytest.LogCaptureFixture, steps: set[int]
) -> None:
    withhold, poison = Withhold(steps), Poison({(1, 1, 4)})
    with caplog.at_level(logging.WARNING, logger="omniquant_pl.callbacks.numerics"):
        calibrate("bad", withhold, poison, NumericsGuard())
    _, bad, again = poison.starts[1]
    assert_equal(again["factors"], bad["factors"])
    assert_equal(again["moments"], bad["moments"])
    (warning,) = [record.getMessage() for record in caplog.records if "finite" in record.message]
    assert "block 1, epoch 1, step 4" in warning
    assert PARAMETER in warning


def test_a_parameter_that_first_gets_a_gradient_in_a_bad_epoch_forgets_it(
    calibrate: Callable[..., SequentialTrainer],
) -> None:
    """No step of the first epoch reaches it: the optimizer has no moments of it to go back to."""

    class FirstEpoch(Withhold):
        def on_train_epoch_start(self, trainer: Any, pl_module: BlockModule) -> None:
            super().on_train_epoch_start(trainer, pl_module)
            self.steps = range(6) if len(poison.starts[-1]) == 0 else ()

    poison = Poison({(0, 1, 5)})
    calibrate("bad", FirstEpoch(()), poison, NumericsGuard())
    first, bad, again = poison.starts[0]
    assert_equal(bad["factors"][PARAMETER], first["factors"][PARAMETER])
    assert_equal(again["factors"], bad["factors"])
    assert_equal(again["moments"], bad["moments"])
    assert len(again["moments"]) == len(first["factors"]) - 1


def test_bad_first_epoch_starts_again_from_the_initial_factors(
    calibrate: Callable[..., SequentialTrainer],
) -> None:
    poison = Poison({(0, 0, 0)})
    calibrate("bad", poison, NumericsGuard(), epochs=1)
    bad, again = poison.starts[0]
    assert_equal(again["factors"], bad["factors"])
    assert again["moments"] == {}
    assert len(poison.starts[1]) == 1


class TestEarlyStopping:
    """An epoch that is taken back has no loss that it could look at."""

    @pytest.mark.parametrize(("epochs", "bad"), [(1, 0), (2, 0), (2, 1), (3, 2)])
    def test_waits_for_the_epoch_to_be_repeated(
        self, calibrate: Callable[..., SequentialTrainer], epochs: int, bad: int
    ) -> None:
        stop, poison = EarlyStopping("loss", patience=1, min_delta=-1e9), Poison({(1, bad, 1)})
        calibrate("bad", poison, NumericsGuard(), stop, epochs=epochs)
        assert [len(starts) for starts in poison.starts] == [epochs, epochs + 1]

    def test_does_not_count_the_epoch(self, calibrate: Callable[..., SequentialTrainer]) -> None:
        stop, poison = EarlyStopping("loss", patience=1, min_delta=1e9), Poison({(0, 1, 1)})
        calibrate("bad", poison, NumericsGuard(), stop, epochs=5)
        assert [len(starts) for starts in poison.starts] == [3, 2]  # one, one taken back, its repetition

    def test_an_epoch_that_is_taken_back_is_none_of_the_least(
        self, calibrate: Callable[..., SequentialTrainer]
    ) -> None:
        stop, poison = EarlyStopping("loss", patience=1, min_delta=1e9), Poison({(0, 1, 1)})
        calibrate("bad", poison, NumericsGuard(), stop, epochs=5, min_epochs=4)
        assert [len(starts) for starts in poison.starts] == [5, 4]

    def test_still_says_that_a_name_is_misspelled(self, calibrate: Callable[..., SequentialTrainer]) -> None:
        poison = Poison({(0, 0, 1)})
        with pytest.raises(RuntimeError, match="metric `los` which is not available"):
            calibrate("bad", poison, NumericsGuard(), EarlyStopping("los"))
        assert len(poison.starts[0]) == 2


def test_learning_rates_are_whole_again_in_the_next_block(
    calibrate: Callable[..., SequentialTrainer],
) -> None:
    poison = Poison({(0, 0, 1)})
    calibrate("bad", poison, NumericsGuard(), epochs=1)
    assert poison.starts[1][0]["rates"] == {"clipping": 1e-2, "transform": 4e-3}


def test_every_block_has_its_own_retries(calibrate: Callable[..., SequentialTrainer]) -> None:
    poison = Poison({(block, epoch, 0) for block in range(2) for epoch in range(2)})
    calibrate("bad", poison, NumericsGuard(retries=2), epochs=1)
    rates = [[start["rates"]["clipping"] for start in starts] for starts in poison.starts]
    assert rates == [[1e-2, 5e-3, 2.5e-3]] * 2


@pytest.mark.parametrize("retries", [0, 2])
def test_what_does_not_heal_stops_the_calibration(calibrate: Callable[..., SequentialTrainer], retries: int) -> None:
    poison = Poison(None)
    with pytest.raises(CalibrationError, match="block 0, epoch 0, step 0") as caught:
        calibrate("bad", poison, NumericsGuard(retries), epochs=1)
    assert PARAMETER in str(caught.value)
    assert "model.clipping.lr" in str(caught.value)
    assert len(poison.starts[0]) == retries + 1
