"""Batches that do not fit into memory are taken in parts, with the same result."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from omniquant_pl.blocks.module import BlockModule
from omniquant_pl.data import CalibrationData
from omniquant_pl.errors import CalibrationError
from omniquant_pl.hidden_states import HiddenStates, Storage, map_hidden_states
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.trainer import SequentialTrainer
from omniquant_pl.utils.micro_batches import gradients_by_micro_batch, with_gradients

Fit = Callable[..., SequentialTrainer]


def test_gradients_of_parts_are_those_of_the_batch() -> None:
    torch.manual_seed(0)
    weight, unused = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(2))
    batch = torch.randn(7, 5, 3), torch.randn(7, 5, 3)

    def loss_of(part: Any) -> Tensor:
        return nn.functional.mse_loss(torch.tanh(part[0] @ weight), part[1])

    whole = loss_of(batch)
    (expected,) = torch.autograd.grad(whole, [weight])
    parameters = [weight, unused]
    loss = with_gradients(*gradients_by_micro_batch(loss_of, batch, parameters, micro_batch_size=3), parameters)
    (2 * loss).backward()
    torch.testing.assert_close(loss, whole)
    torch.testing.assert_close(weight.grad, 2 * expected)
    assert unused.grad is None


def test_parameters_that_share_a_gradient() -> None:
    """Autograd gives a sum's terms the same tensor."""
    one, other = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    batch = (torch.randn(6, 4, generator=torch.Generator().manual_seed(0)),)
    parts = gradients_by_micro_batch(
        lambda part: ((one + other) * part[0]).mean(), batch, [one, other], micro_batch_size=2
    )
    with_gradients(*parts, [one, other]).backward()
    assert one.grad is not None
    torch.testing.assert_close(one.grad, batch[0].mean(0) / 4)
    torch.testing.assert_close(other.grad, one.grad)


class _Probe:
    """Lives as long as the graph that it is tied to."""

    def fail(self, gradient: Tensor) -> None:
        raise torch.OutOfMemoryError("too much")


class _SmallMemory:
    """Lets a block fail for more samples than some, in the forward or in the backward pass.

    Attributes:
        graphs: What dies with the graph of a pass that failed.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, samples: int, in_backward: bool) -> None:
        self._samples = samples
        self._in_backward = in_backward
        self.graphs: list[weakref.ref[_Probe]] = []
        original = BlockModule.forward
        monkeypatch.setattr(BlockModule, "forward", lambda module, hidden: self._run(original(module, hidden)))

    def _run(self, output: Tensor) -> Tensor:
        assert not any(graph() for graph in self.graphs), "what did not fit is still in memory"
        if len(output) <= self._samples or not output.requires_grad:
            return output
        probe = _Probe()
        self.graphs.append(weakref.ref(probe))
        assert output.grad_fn is not None
        output.grad_fn.metadata["probe"] = probe
        if not self._in_backward:
            raise torch.OutOfMemoryError("too much")
        output.register_hook(probe.fail)
        return output


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_same_factors(
    llama: Path,
    fit: Fit,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    in_backward: bool,
    accumulate: int,
) -> None:
    def learned(name: str) -> dict[str, Tensor]:
        model = OmniQuantModel(str(llama))  # without a transformation, whose steps rounding may turn
        options = {"max_epochs": 2, "accumulate_grad_batches": accumulate, "default_root_dir": tmp_path / name}
        trainer = fit(model, [], {"batch_size": 3}, **options)
        return trainer.run_folder.load_factors(0) | {
            f"1.{name}": factor for name, factor in trainer.run_folder.load_factors(1).items()
        }

    whole = learned("whole")
    memory = _SmallMemory(monkeypatch, 1, in_backward)
    in_parts = learned("parts")
    assert len(memory.graphs) == 2  # three samples, then two; later blocks know
    assert "2 samples do not fit into memory at once; it goes on with at most 1" in caplog.text
    torch.testing.assert_close(in_parts, whole, rtol=1e-4, atol=1e-6)


def test_a_second_fit_computes_as_many_at_once_as_it_says(
    llama: Path, fit: Fit, token_files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    original = BlockModule.loss

    def recorded(module: BlockModule, part: Any) -> Tensor:
        sizes.append(len(part[0]))
        return original(module, part)

    monkeypatch.setattr(BlockModule, "loss", recorded)
    trainer = fit(OmniQuantModel(str(llama)), [], {"batch_size": 3, "micro_batch_size": 1})
    assert set(sizes) == {1}
    for micro_batch_size, expected in ((None, {3}), (2, {2, 1})):
        sizes.clear()
        data = {"dataset": str(token_files[0]), "samples": 6, "evaluation": [str(token_files[1])], "batch_size": 3}
        trainer.fit(OmniQuantModel(str(llama)), datamodule=CalibrationData(**data, micro_batch_size=micro_batch_size))
        assert set(sizes) == expected


@pytest.mark.parametrize("in_backward", [False, True])
def test_one_sample_that_does_not_fit(
    llama: Path, fit: Fit, monkeypatch: pytest.MonkeyPatch, in_backward: bool
) -> None:
    _SmallMemory(monkeypatch, 0, in_backward)
    with pytest.raises(CalibrationError, match=r"block 0: one sample does not fit .* data\.sequence_length"):
        fit(OmniQuantModel(str(llama)), [], {"batch_size": 2})


def test_passes_without_gradients_take_halves(tmp_path: Path) -> None:
    seen: list[int] = []

    def double(batch: Tensor) -> Tensor:
        seen.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("too much")
        return batch * 2

    values = torch.randn(5, 3, 2)
    storage = Storage("device", torch.float32, torch.device("cpu"), tmp_path)
    result = map_hidden_states(double, HiddenStates(values, storage.device), storage)
    assert torch.equal(result.values, values * 2)
    assert seen == [5, 3, 2, 1, 2]
    with pytest.raises(torch.OutOfMemoryError):
        map_hidden_states(double, HiddenStates(values, storage.device), storage, splits=False)
