"""A call leaves nothing in the process, and works whatever the caller has set in it."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse._common import parsing_settings
from transformers import AutoModelForCausalLM, PreTrainedModel

from omniquant_pl import quantize
from omniquant_pl.blocks.module import BlockModule
from omniquant_pl.errors import CalibrationError, ConfigurationError

TOKENS = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(0))
QUICK: dict[str, Any] = {"trainer.max_epochs": 1, "trainer.accelerator": "cpu"}


@pytest.fixture
def model(llama: Path) -> PreTrainedModel:
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    return loaded


def state() -> dict[str, Any]:
    """Everything that a call could leave behind."""
    names = ["", *(name for name in logging.root.manager.loggerDict if name.startswith(("lightning", "omniquant")))]
    loggers = {name: logging.getLogger(name) for name in names}
    return {
        "random": (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()),  # noqa: NPY002
        "environment": dict(os.environ),
        "loggers": {name: (each.level, list(each.handlers), each.propagate) for name, each in loggers.items()},
        "filters": list(warnings.filters),
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "torch": (
            torch.get_default_dtype(),
            torch.get_default_device(),
            torch.get_num_threads(),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.cudnn.benchmark,
            torch.get_float32_matmul_precision(),
        ),
        "process": (list(sys.argv), Path.cwd(), sys.excepthook, threading.active_count()),
        "parser": dict(parsing_settings),
    }


def _fails(*_: Any, **__: Any) -> None:
    raise CalibrationError("as a test wants it")


def _signal(number: int) -> Callable[..., None]:
    return lambda *_, **__: signal.raise_signal(number)


OUTCOMES: dict[str, tuple[Callable[..., None] | None, dict[str, Any], type[BaseException] | None]] = {
    "success": (None, QUICK, None),
    "determinism and other options": (
        None,
        {**QUICK, "trainer.deterministic": True, "trainer.benchmark": True, "seed_everything": 9},
        None,
    ),
    "a log file": (None, {**QUICK, "progress.log_file": "log.txt"}, None),
    "a wrong setting": (None, {"bits": 4}, ConfigurationError),
    "a wrong value": (None, {"model.weights.bits": 1}, ConfigurationError),
    "a failure": (_fails, QUICK, CalibrationError),
    "a failure with a log file": (_fails, {**QUICK, "progress.log_file": "log.txt"}, CalibrationError),
    "Control-C": (_signal(signal.SIGINT), QUICK, KeyboardInterrupt),
}


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_nothing_is_left_behind(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outcome: str
) -> None:
    event, settings, error = OUTCOMES[outcome]
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    logging.getLogger("lightning.pytorch").setLevel(logging.INFO)
    if event is not None:
        monkeypatch.setattr(BlockModule, "training_step", event)
    before = state()
    with pytest.raises(error) if error else contextlib.nullcontext():
        quantize(model, scheme="w4a16", calibration=TOKENS, settings=settings)
    assert state() == before
    assert not any((tmp_path / "temporary").iterdir())


def test_a_second_control_c_is_one_too(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(*_: Any, **__: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(BlockModule, "training_step", twice)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, scheme="w4a16", calibration=TOKENS, settings=QUICK)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_goes_to_the_handler_of_the_caller(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[int] = []
    monkeypatch.setattr(BlockModule, "training_step", _signal(signal.SIGTERM))
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        with pytest.raises(KeyboardInterrupt, match="SIGTERM"):
            quantize(model, scheme="w4a16", calibration=TOKENS, settings=QUICK)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]


@contextlib.contextmanager
def _default_dtype() -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize(
    "surroundings",
    [torch.no_grad, torch.inference_mode, _default_dtype, lambda: torch.device("meta")],
    ids=["no_grad", "inference_mode", "default dtype", "default device"],
)
def test_what_the_caller_has_set_changes_no_result(model: PreTrainedModel, surroundings: Callable[[], Any]) -> None:
    expected = quantize(model, scheme="w4a16", calibration=TOKENS, settings=QUICK).state_dict()
    with surroundings():
        found = quantize(model, scheme="w4a16", calibration=TOKENS, settings=QUICK).state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_another_thread_may_call(model: PreTrainedModel) -> None:
    found: list[PreTrainedModel] = []

    def call() -> None:
        found.append(quantize(model, scheme="w4a16", calibration=TOKENS, settings={**QUICK, "trainer.max_epochs": 0}))

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert len(found) == 1
