"""Leaves the process as it was: a library call may change nothing that its caller did not ask for."""

from __future__ import annotations

import logging
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext

import torch
from lightning.pytorch.utilities.seed import isolate_rng

from omniquant_pl.cli.program import quieten

__all__ = ["untouched_process"]


@contextmanager
def untouched_process() -> Iterator[None]:
    """Run the block in a process as the command line has it, and put everything back afterwards, failed or not.

    That is random numbers, the environment, loggers, filters of warnings, signal handlers, and torch's default dtype
    and device, gradient mode, threads and precision settings.
    """
    with ExitStack() as stack:
        stack.enter_context(isolate_rng())
        stack.enter_context(warnings.catch_warnings())
        for kept in (_environment, _loggers, _signal_handlers, _torch):
            stack.enter_context(kept())
        quieten()
        yield


@contextmanager
def _environment() -> Iterator[None]:
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


@contextmanager
def _loggers() -> Iterator[None]:
    known = [each for each in logging.root.manager.loggerDict.values() if isinstance(each, logging.Logger)]
    before = [(each, each.level, list(each.handlers), each.propagate, each.disabled) for each in (logging.root, *known)]
    try:
        yield
    finally:
        for logger, level, handlers, propagate, disabled in before:
            logger.setLevel(level)
            logger.handlers[:] = handlers
            logger.propagate, logger.disabled = propagate, disabled


@contextmanager
def _signal_handlers() -> Iterator[None]:
    """Only the main thread has any, and may set them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)


@contextmanager
def _torch() -> Iterator[None]:
    cudnn, threads = torch.backends.cudnn, torch.get_num_threads()
    dtype, precision = torch.get_default_dtype(), torch.get_float32_matmul_precision()
    device = nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = cudnn.benchmark, cudnn.deterministic
    torch.set_default_dtype(torch.float32)
    try:
        with torch.inference_mode(False), torch.enable_grad(), device:
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
        cudnn.benchmark, cudnn.deterministic = benchmark
