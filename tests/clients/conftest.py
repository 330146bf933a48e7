"""Exports of calibrated models, and what programs in an environment of their own make of them."""

from __future__ import annotations

import os
import subprocess
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import omniquant_pl
from omniquant_pl.export import open_format
from omniquant_pl.export.verification import calibrated_logits
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.run.folder import RunFolder
from omniquant_pl.trainer import SequentialTrainer

WORKER = Path(__file__).with_name("worker.py")
PACKAGES = (str(Path(omniquant_pl.__file__).parents[1]), sysconfig.get_path("purelib"))


class Exported(NamedTuple):
    """An exported model.

    Attributes:
        model: Its settings.
        run: The run.
        folder: What was written.
        tokens: Token ids `[batch, tokens]`.
    """

    model: OmniQuantModel
    run: RunFolder
    folder: Path
    tokens: Tensor

    def error(self, found: Tensor, quantizes_activations: bool = True) -> float:
        """Norm of the difference to the calibrated model's logits in the same dtype, over their norm."""
        calibrated = calibrated_logits(self.model, self.run, self.tokens, quantizes_activations, found.dtype)
        return float((found - calibrated).norm() / calibrated.norm())

    @property
    def size_over_theory(self) -> float:
        """Bytes of the weight files over those of codes, float16 scales, zero points, and other tensors as stored."""
        tensors = [load_file(file) for file in self.folder.glob("*.safetensors")]
        weights = self.model.quantized_weights
        linears = {name.removesuffix(".weight") for name in weights}
        theory = sum(
            float(tensor.nbytes)
            for found in tensors
            for name, tensor in found.items()
            if name.endswith(".bias") or name.rpartition(".")[0] not in linears
        )
        for spec, (rows, columns) in weights.values():
            groups = 1 if spec.group_size is None else -(-columns // spec.group_size)
            theory += rows * columns * spec.bits / 8 + rows * groups * (2 + (0 if spec.symmetric else spec.bits / 8))
        return sum(file.stat().st_size for file in self.folder.glob("*.safetensors")) / theory


@pytest.fixture
def export(fit: Callable[..., SequentialTrainer], tmp_path: Path) -> Callable[..., Exported]:
    """Folds a model as its factors start, and exports it; two rows of tokens, as long as calibration's."""

    def export(format_name: str, path: Path | str, *arguments: Any, **settings: Any) -> Exported:
        folder = tmp_path / f"export-{len(list(tmp_path.glob('export-*')))}"
        model = OmniQuantModel(str(path), *arguments, **settings)
        run = fit(model, max_epochs=0, default_root_dir=folder / "run").run_folder
        open_format(format_name, model).write(model, run, folder / "out")
        length = min(64, model.source.positions)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(2, model.source.config.vocab_size, (2, length), generator=generator)
        return Exported(model, run, folder / "out", tokens)

    return export


@pytest.fixture
def load(clients: str, tmp_path: Path) -> Callable[..., list[Tensor]]:
    """Runs a program of a format on exports, all in one process, and returns their logits."""

    def load(format_name: str, program: str, exports: Sequence[Exported]) -> list[Tensor]:
        jobs = []
        for index, exported in enumerate(exports):
            tokens, logits = (tmp_path / f"{kind}-{index}.npy" for kind in ("tokens", "logits"))
            np.save(tokens, exported.tokens.numpy())
            jobs.append((exported.folder, tokens, logits))
        command = [clients, str(WORKER), format_name, program, *(str(path) for job in jobs for path in job)]
        environment = os.environ | {"OMNIQUANT_PATH": os.pathsep.join(PACKAGES)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        return [torch.from_numpy(np.load(logits)) for _, _, logits in jobs]

    return load
