"""Exports are compared with the calibrated model in what the program computes in."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from omniquant_pl.export import HfExport, Verification
from omniquant_pl.export.clients import transformers_logits
from omniquant_pl.export.format import Client
from omniquant_pl.export.verification import calibrated_logits
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.spec import ActivationSpec, WeightSpec
from omniquant_pl.trainer import SequentialTrainer


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_precision_of_the_program(
    llama: Path,
    fit: Callable[..., SequentialTrainer],
    tokens: Tensor,
    tmp_path: Path,
    dtype: torch.dtype,
    rounding: float,
) -> None:
    class Export(HfExport):
        clients = (Client("a program", (), partial(transformers_logits, dtype=dtype)),)

    model = OmniQuantModel(str(llama), WeightSpec(4, 16))
    run = fit(model, max_epochs=0).run_folder
    export = Export()
    export.write(model, run, tmp_path / "out")
    (result,) = Verification(export, tokens).run(model, run, tmp_path / "out")
    assert result.error is not None
    assert result.error <= rounding
    assert model.source.embed(tokens).dtype == torch.float32


def test_programs_that_quantize_activations_are_compared_with_what_does(
    llama: Path, fit: Callable[..., SequentialTrainer], tokens: Tensor, tmp_path: Path
) -> None:
    model = OmniQuantModel(str(llama), WeightSpec(4, 16), ActivationSpec(4))
    run = fit(model, max_epochs=0).run_folder
    calibrated = {quantizes: calibrated_logits(model, run, tokens, quantizes) for quantizes in (False, True)}

    class Export(HfExport):
        clients = tuple(
            Client(str(quantizes), (), lambda folder, tokens, logits=logits: logits, quantizes_activations=quantizes)
            for quantizes, logits in calibrated.items()
        )

    results = Verification(Export(), tokens).run(model, run, tmp_path)
    assert [result.error for result in results] == [0, 0]
    assert (calibrated[True] - calibrated[False]).norm() > 1e-2 * calibrated[True].norm()
