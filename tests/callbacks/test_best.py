"""The state with the least loss, against losses that are computed again from every state a fit went through."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

from omniquant_pl.blocks.module import BlockModule
from omniquant_pl.callbacks import KeepBestState, NumericsGuard
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.spec import ClippingSpec, ObjectiveSpec, RoundingSpec, TransformSpec, WeightSpec, WindowSpec
from omniquant_pl.trainer import SequentialTrainer


class States(Callback):
    """Every fit's states: at its start and behind each epoch; their losses; and the state that it ends with."""

    def __init__(self) -> None:
        self.states: list[list[dict[str, Tensor]]] = []
        self.losses: list[list[float]] = []
        self.results: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.states.append([copy.deepcopy(pl_module.state_dict())])

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.states[-1].append(copy.deepcopy(pl_module.state_dict()))

    def on_train_end(self, trainer: Any, pl_module: BlockModule) -> None:
        samples = list(zip(*(s.values for s in trainer.train_dataloader.streams), strict=True))
        self.losses.append([self.loss(pl_module, state, samples) for state in self.states[-1]])

    @staticmethod
    @torch.no_grad()
    def loss(module: BlockModule, state: dict[str, Tensor], samples: list[tuple[Tensor, ...]]) -> float:
        """Sample after sample, in float64 behind the last block."""
        left = copy.deepcopy(module.state_dict())
        module.load_state_dict(state)
        errors = []
        for hidden, *targets in samples:
            output = module(hidden[None])[0].double()
            errors.append(sum(float((output - target.double()).square().mean()) for target in targets))
        module.load_state_dict(left)
        return sum(errors) / len(errors)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.results.append(copy.deepcopy(pl_module.state_dict()))

    def best(self, fit: int) -> int:
        return min(range(len(self.losses[fit])), key=self.losses[fit].__getitem__)


def assert_equal(first: Any, second: Any) -> None:
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"objective": ObjectiveSpec(aug_loss=True, window=WindowSpec(2, 1))},
        {"transform": TransformSpec(lr=1.0), "rounding": RoundingSpec("learned", 1.0)},
    ],
    ids=["plain", "windows", "all-factors"],
)
def test_every_fit_ends_with_the_least_loss_of_all_its_states(
    make_llama: Callable[..., Path], fit: Callable[..., SequentialTrainer], settings: dict[str, Any]
) -> None:
    """At the highest rates, which throw factors about: losses rise again."""
    states, folder = States(), make_llama(num_hidden_layers=3)
    model = OmniQuantModel(str(folder), WeightSpec(3), clipping=ClippingSpec(lr=1.0), **settings)
    trainer = fit(model, [states, KeepBestState()], {"batch_size": 4, "shuffle": True}, max_epochs=5)
    fits = 2 if "objective" in settings else 3
    assert len(states.results) == len(states.losses) == fits
    for number in range(fits):
        assert len(states.losses[number]) == 6
        assert_equal(states.results[number], states.states[number][states.best(number)])
    assert any(states.best(number) < 5 for number in range(fits)), "no loss has risen: the last state is the best"
    stored = trainer.run_folder.load_factors(2)["mlp.up_proj.clip.upper"]  # the last block of the last fit
    last = [state for name, state in states.results[-1].items() if name.endswith("up_proj.upper")][-1]
    assert torch.equal(stored, last)


def test_learning_itself_is_left_alone(llama: Path, fit: Callable[..., SequentialTrainer], tmp_path: Path) -> None:
    """The states that a fit goes through are those without the callback."""
    runs = []
    for name, callbacks in {"plain": [], "best": [KeepBestState()]}.items():
        states = States()
        model = OmniQuantModel(str(llama), WeightSpec(3), clipping=ClippingSpec(lr=1.0))
        data = {"batch_size": 4, "shuffle": True}
        fit(model, [states, *callbacks], data, max_epochs=3, default_root_dir=tmp_path / name)
        runs.append(states)
    plain, best = runs
    assert_equal(best.states[0], plain.states[0])
    assert_equal(plain.results[0], plain.states[0][-1])
    assert plain.best(0) < 3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_where_no_loss_is_finite_a_block_keeps_its_own_start(
    llama: Path, fit: Callable[..., SequentialTrainer], monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    """Not the state of the block before it."""
    computed = BlockModule.loss
    monkeypatch.setattr(
        BlockModule, "loss", lambda self, batch: computed(self, batch) + (value if self.index == 1 else 0.0)
    )
    states = States()
    fit(OmniQuantModel(str(llama), transform=TransformSpec()), [states, KeepBestState()], max_epochs=2)
    assert_equal(states.results[1], states.states[1][0])
    assert any(not torch.equal(states.results[0][name], factor) for name, factor in states.results[1].items())


def test_an_epoch_that_is_taken_back_does_not_count(llama: Path, fit: Callable[..., SequentialTrainer]) -> None:
    class Poison(Callback):
        def __init__(self) -> None:
            self.steps = 0

        def on_after_backward(self, trainer: Any, pl_module: BlockModule) -> None:
            if self.steps == 7:
                for parameter in pl_module.parameters():
                    parameter.grad = torch.full_like(parameter, float("nan"))
            self.steps += 1

    states = States()
    callbacks = [Poison(), KeepBestState(), NumericsGuard(), states]
    trainer = fit(OmniQuantModel(str(llama), WeightSpec(2, 16)), callbacks, max_epochs=2)
    for number in range(2):
        finite = [i for i, loss in enumerate(states.losses[number]) if loss == loss]
        best = min(finite, key=states.losses[number].__getitem__)
        assert_equal(states.results[number], states.states[number][best])
        factors = trainer.run_folder.load_factors(number)
        assert all(bool(torch.isfinite(factor).all()) for factor in factors.values())
