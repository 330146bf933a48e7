"""Calls of libomniquant_cuda: on the tensors' device and the caller's stream, without synchronisation."""

from typing import Any

import torch

__all__ = ["ELEMENT", "launch"]

ELEMENT = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # enum in omniquant.h


def launch(function: Any, device: torch.device, *arguments: int | None) -> None:
    """Enqueue a C function whose last argument is the stream.

    Args:
        function: it returns a CUDA error, 0 for success.
        device: where its pointers are.
        arguments: what stands before the stream; None is the null pointer.

    Raises:
        RuntimeError: CUDA refused the launch.
    """
    with torch.cuda.device(device):
        error = function(*arguments, torch.cuda.current_stream(device).cuda_stream)
    if error:
        raise RuntimeError(f"CUDA error {error} in {function.__name__} on {device}")
