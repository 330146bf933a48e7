"""No export holds an infinity that the model does not have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from omniquant_pl.callbacks import ExportCallback
from omniquant_pl.errors import ConfigurationError
from omniquant_pl.export import FORMATS, open_format
from omniquant_pl.export.narrowing import narrowed
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.run.folder import RunFolder
from omniquant_pl.spec import TransformSpec, WeightSpec
from omniquant_pl.trainer import SequentialTrainer
from tiny_tokenizers import byte_level

Finish = Callable[[OmniQuantModel], RunFolder]
WITH_FLOATS = sorted(set(FORMATS) - {"factors"})
LARGE = 7.0e4


@given(st.floats(-(2.0**127), 2.0**127, width=32), st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
def test_a_value_is_refused_where_the_dtype_rounds_it_to_infinity(value: float, dtype: torch.dtype) -> None:
    tensor = torch.tensor([0.0, value])
    if bool(tensor.to(dtype).isfinite().all()):
        assert torch.equal(narrowed(tensor, dtype, "a"), tensor.to(dtype))
        return
    with pytest.raises(ConfigurationError, match=r"^export\.dtype: a holds .* set it to bfloat16 or float32$"):
        narrowed(tensor, dtype, "a")


@pytest.fixture
def large(make_llama: Callable[..., Path], tmp_path: Path) -> Callable[[str], Path]:
    """A LLaMA in bfloat16 in which one tensor has a value that float16 does not hold."""

    def make(name: str) -> Path:
        sizes = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "vocab_size": 520}
        model = AutoModelForCausalLM.from_pretrained(make_llama(**sizes))
        model.state_dict()[name].view(-1)[3] = LARGE
        model.to(torch.bfloat16).save_pretrained(tmp_path / "source")
        byte_level().save_pretrained(tmp_path / "source")
        return tmp_path / "source"

    return make


def exported(model: Path, run: Path, format_name: str, dtype: Any, finish: Finish) -> Path:
    settings = OmniQuantModel(str(model), WeightSpec(3, 32))
    export = open_format(format_name, settings, dtype)
    export.check_values(settings)
    export.write(settings, finish(settings), run)
    return run


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
@pytest.mark.parametrize("format_name", WITH_FLOATS)
def test_values_outside_the_blocks_are_refused(
    large: Callable[[str], Path], finish: Finish, tmp_path: Path, format_name: str, name: str
) -> None:
    with pytest.raises(ConfigurationError, match=rf"^export\.(dtype|format): {name} holds 7\.\d*e\+04|holds 70144"):
        exported(large(name), tmp_path / "out", format_name, "float16", finish)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format_name", ["hf", "packed", "gptq", "compressed-tensors", "mlc"])
def test_values_of_folded_blocks_are_refused(
    large: Callable[[str], Path], finish: Finish, tmp_path: Path, format_name: str
) -> None:
    name = "model.layers.1.input_layernorm.weight"
    with pytest.raises(ConfigurationError, match=r"input_layernorm\.weight holds 70144, and the largest .* 65504"):
        exported(large(name), tmp_path / "out", format_name, "float16", finish)
    assert not (tmp_path / "out").exists()


def test_dequantized_weights_are_refused(large: Callable[[str], Path], finish: Finish, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(ConfigurationError, match=rf"^export\.dtype: {name} holds "):
        exported(large(name), tmp_path / "out", "hf", "float16", finish)


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float32"])
@pytest.mark.parametrize("format_name", ["hf", "packed", "gptq", "compressed-tensors"])
def test_other_dtypes_hold_them(
    large: Callable[[str], Path], finish: Finish, tmp_path: Path, format_name: str, dtype: Any
) -> None:
    folder = exported(large("model.embed_tokens.weight"), tmp_path / "out", format_name, dtype, finish)
    tensors = load_file(folder / "model.safetensors")
    assert all(bool(found.isfinite().all()) for found in tensors.values() if found.is_floating_point())
    assert float(tensors["model.embed_tokens.weight"].view(-1)[3]) == pytest.approx(LARGE, rel=0.01)


class TestFit:
    def test_it_is_refused_before_any_work(
        self, large: Callable[[str], Path], fit: Callable[..., SequentialTrainer], tmp_path: Path
    ) -> None:
        model = OmniQuantModel(str(large("model.embed_tokens.weight")), WeightSpec(3, 32))
        with pytest.raises(ConfigurationError, match=r"^export\.dtype: model\.embed_tokens\.weight holds"):
            fit(model, [ExportCallback(dtype="float16")])
        assert not (tmp_path / "run" / "blocks").exists()

    def test_what_only_folding_shows_keeps_the_calibration(
        self, large: Callable[[str], Path], fit: Callable[..., SequentialTrainer], tmp_path: Path
    ) -> None:
        name = "model.layers.0.post_attention_layernorm.weight"
        model = OmniQuantModel(str(large(name)), WeightSpec(3, 32), transform=TransformSpec(initial="ones"))
        with pytest.raises(ConfigurationError, match=r"the calibration is kept: python train\.py export --config .*"):
            fit(model, [ExportCallback(dtype="float16")], max_epochs=0)
        assert len(list((tmp_path / "run" / "blocks").iterdir())) == 2
        assert not (tmp_path / "run" / "model").exists()
