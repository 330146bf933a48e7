"""What folding leaves in ``blocks/``: the names that others read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from omniquant_pl.data import CalibrationData
from omniquant_pl.errors import CalibrationError, ConfigurationError
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.spec import TransformSpec, WeightSpec
from omniquant_pl.trainer import SequentialTrainer

SHAPES = {  # [out, in] with two kv heads
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (16, 32),
    "self_attn.v_proj": (16, 32),
    "self_attn.o_proj": (32, 32),
    "mlp.gate_proj": (48, 32),
    "mlp.up_proj": (48, 32),
    "mlp.down_proj": (32, 48),
}
SCALES = {
    "input_layernorm": 32,
    "post_attention_layernorm": 32,
    "self_attn.v_proj": 16,
    "self_attn.q_proj": 8,  # one for each rotary pair of channels
}


def shapes_in(run: SequentialTrainer, index: int) -> dict[str, tuple[int, ...]]:
    path = run.run_folder.path / "blocks" / f"{index:05d}.safetensors"
    return {name: tuple(tensor.shape) for name, tensor in load_file(path).items()}


@pytest.mark.parametrize(
    ("weights", "transform", "ends", "groups", "scales"),
    [
        (WeightSpec(), None, ("upper", "lower"), None, {}),
        (WeightSpec(symmetric=True), None, ("upper",), None, {}),
        (WeightSpec(group_size=16), TransformSpec(), ("upper", "lower"), 16, SCALES),
        (WeightSpec(), TransformSpec(mlp=True), ("upper", "lower"), None, {**SCALES, "mlp.up_proj": 48}),
    ],
    ids=["clipping", "symmetric", "g16-transform", "mlp"],
)
def test_files_and_names(
    make_llama: Callable[..., Path],
    fit: Callable[..., SequentialTrainer],
    weights: WeightSpec,
    transform: TransformSpec | None,
    ends: tuple[str, ...],
    groups: int | None,
    scales: dict[str, int],
) -> None:
    folder = make_llama(num_key_value_heads=2)
    run = fit(OmniQuantModel(str(folder), weights, transform=transform), max_epochs=0)
    clips = {
        f"{linear}.clip.{end}": (out, columns // (groups or columns))
        for linear, (out, columns) in SHAPES.items()
        for end in ends
    }
    expected = clips | {f"{pair}.scale": (channels,) for pair, channels in scales.items()}
    assert [shapes_in(run, index) for index in range(2)] == [expected, expected]
    files = sorted(path.name for path in (run.run_folder.path / "blocks").iterdir())
    assert files == ["00000.safetensors", "00001.safetensors"]


def test_nothing_learned_gives_empty_files(llama: Path, fit: Callable[..., SequentialTrainer]) -> None:
    run = fit(OmniQuantModel(str(llama), clipping=None), max_epochs=2)
    assert [shapes_in(run, index) for index in range(2)] == [{}, {}]


def test_calibration_without_folding_is_refused(
    llama: Path, fit: Callable[..., SequentialTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("omniquant_pl.callbacks.FoldCallback.on_block_trained", lambda *_: None)
    with pytest.raises(CalibrationError, match="block 0: no callback has folded it"):
        fit(OmniQuantModel(str(llama)), max_epochs=0)


def test_a_fit_without_a_folding_callback_is_refused_before_any_work(
    llama: Path, token_files: tuple[Path, Path], tmp_path: Path
) -> None:
    calibration, _ = token_files
    trainer = SequentialTrainer(default_root_dir=tmp_path / "run", accelerator="cpu", max_epochs=0)
    with pytest.raises(
        ConfigurationError, match=r"^trainer\.callbacks: no callback folds the blocks; add .*FoldCallback"
    ):
        trainer.fit(OmniQuantModel(str(llama)), datamodule=CalibrationData(str(calibration), samples=2))
    assert not (tmp_path / "run").exists()
