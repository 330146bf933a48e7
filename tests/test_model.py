"""The ``model:`` section: what it opens, and where learning starts."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from omniquant_pl.errors import ConfigurationError
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.run.folder import RunFolder
from omniquant_pl.spec import ActivationSpec, RotationSpec, TransformSpec, WeightSpec
from omniquant_pl.trainer import SequentialTrainer


@pytest.fixture
def previous(llama: Path, fit: Callable[..., SequentialTrainer], tmp_path: Path) -> RunFolder:
    """A finished run whose factors have left their starting point."""
    model = OmniQuantModel(str(llama), transform=TransformSpec())
    return fit(model, default_root_dir=tmp_path / "previous").run_folder


def factors_in(folder: RunFolder) -> list[dict[str, torch.Tensor]]:
    return [load_file(path) for path in sorted(folder.blocks.iterdir())]


class TestStart:
    def test_no_epochs_keep_the_factors_of_another_run(
        self, previous: RunFolder, llama: Path, fit: Callable[..., SequentialTrainer]
    ) -> None:
        model = OmniQuantModel(str(llama), transform=TransformSpec(), parameters=str(previous.path))
        kept = factors_in(fit(model, max_epochs=0).run_folder)
        torch.testing.assert_close(kept, factors_in(previous), rtol=0, atol=0)
        assert (kept[0]["mlp.up_proj.clip.upper"] != 4.0).any()

    def test_learning_goes_on_from_there(
        self, previous: RunFolder, llama: Path, fit: Callable[..., SequentialTrainer]
    ) -> None:
        model = OmniQuantModel(str(llama), transform=TransformSpec(), parameters=str(previous.path))
        upper = "mlp.up_proj.clip.upper"
        learned = factors_in(fit(model).run_folder)[0][upper]
        start = factors_in(previous)[0][upper]
        assert 0 < (learned - start).abs().max() <= 6 * 1.1e-2  # six steps of Adam

    def test_codes_are_left_behind_with_one_warning(
        self, previous: RunFolder, llama: Path, fit: Callable[..., SequentialTrainer], caplog: pytest.LogCaptureFixture
    ) -> None:
        shape = OmniQuantModel(str(llama)).source.block_shapes(0)["mlp.up_proj.weight"]
        for index in range(2):
            codes = {"mlp.up_proj.codes": torch.zeros(shape, dtype=torch.uint8)}
            previous.save_factors(index, previous.load_factors(index) | codes)
        model = OmniQuantModel(str(llama), transform=TransformSpec(), parameters=str(previous.path))
        with caplog.at_level("WARNING", logger="omniquant_pl"):
            found = factors_in(fit(model, max_epochs=0).run_folder)
        assert not any(name.endswith(".codes") for factors in found for name in factors)
        warned = [record.getMessage() for record in caplog.records if "codes are not" in record.getMessage()]
        assert len(warned) == 1
        assert str(previous.factor_file(0)) in warned[0]

    @pytest.mark.parametrize("missing", [0, 1])
    def test_unfinished_run_is_refused_before_any_work(
        self,
        previous: RunFolder,
        llama: Path,
        fit: Callable[..., SequentialTrainer],
        tmp_path: Path,
        missing: int,
    ) -> None:
        previous.factor_file(missing).unlink()
        model = OmniQuantModel(str(llama), transform=TransformSpec(), parameters=str(previous.path))
        with pytest.raises(ConfigurationError, match=r"^model\.parameters: ") as caught:
            fit(model)
        assert str(previous.factor_file(missing)) in str(caught.value)
        assert not (tmp_path / "run").exists()

    def test_nowhere(self, llama: Path) -> None:
        both = OmniQuantModel(str(llama), transform=TransformSpec(scales="scales.pt"), parameters="run")
        with pytest.raises(ConfigurationError, match=r"^model\.transform\.scales: .* or model\.parameters to null"):
            both.verify()
        model = OmniQuantModel(str(llama), parameters="nowhere")
        with pytest.raises(ConfigurationError, match=r"^model\.parameters: nowhere is not"):
            model.verify()

    @pytest.mark.parametrize(
        ("weights", "transform"),
        [(WeightSpec(group_size=16), TransformSpec()), (WeightSpec(), None)],
        ids=["groups", "transform"],
    )
    def test_factors_of_other_settings_are_refused(
        self,
        previous: RunFolder,
        llama: Path,
        fit: Callable[..., SequentialTrainer],
        weights: WeightSpec,
        transform: TransformSpec | None,
    ) -> None:
        model = OmniQuantModel(str(llama), weights, transform=transform, parameters=str(previous.path))
        with pytest.raises(ConfigurationError, match=r"^model\.parameters: .*does not fit"):
            fit(model)


def test_values_that_are_not_finite_are_refused_before_any_work(
    llama: Path, fit: Callable[..., SequentialTrainer], tmp_path: Path
) -> None:
    bad = Path(shutil.copytree(llama, tmp_path / "bad"))
    tensors = load_file(bad / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, bad / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigurationError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        fit(OmniQuantModel(str(bad)))
    assert not (tmp_path / "run").exists()


def test_quantized_weights(make_llama: Callable[..., Path]) -> None:
    folder = make_llama(num_key_value_heads=2)
    stored = load_file(folder / "model.safetensors")
    found = OmniQuantModel(str(folder), WeightSpec(3, bits_of={"down_proj": 5})).quantized_weights
    assert {name: shape for name, (_, shape) in found.items()} == {
        name: tuple(tensor.shape) for name, tensor in stored.items() if name.endswith("_proj.weight")
    }
    for name, (spec, _) in found.items():
        assert spec.bits == (5 if "down_proj" in name else 3)


def test_widths_of_linears_that_the_model_does_not_have_are_refused(llama: Path) -> None:
    model = OmniQuantModel(str(llama), WeightSpec(3, bits_of={"fc2": 4}))
    with pytest.raises(ConfigurationError, match=r"^model\.weights\.bits_of\.fc2: .* are: down_proj, "):
        model.verify()


def test_only_the_factors_are_parameters(make_llama: Callable[..., Path]) -> None:
    model = OmniQuantModel(
        str(make_llama(attention_bias=True)),
        WeightSpec(group_size=16),
        ActivationSpec(),
        transform=TransformSpec(),
    )
    assert list(model.parameters()) == []
    tensors = model.source.block_tensors(0)
    call = model.source.calls(4)[0]
    nearest = model.round_to_nearest(0, tensors, call)
    assert nearest.is_folded
    assert list(nearest.parameters()) == []
    factors = model._factors(0, tensors, learned=True).export()
    folded = model.folded(0, tensors, call, factors)
    learnable = {tuple(parameter.shape) for parameter in folded.parameters()}
    assert learnable == {tuple(factor.shape) for factor in factors.values()}
    assert all("factors." in name for name, _ in folded.named_parameters())


def test_opening_waits_for_the_first_use() -> None:
    """Printing a configuration or the help needs no model."""
    model = OmniQuantModel("no/such-model")
    assert model.scheme.name == "w4a16"


def test_factors_learned_for_another_rotation_are_refused(previous: RunFolder, llama: Path) -> None:
    rotated = {"residual": True, "values": True, "seed": 0}
    previous.config.write_text(yaml.safe_dump({"model": {"rotation": rotated}}))
    OmniQuantModel(
        str(llama), transform=TransformSpec(), rotation=RotationSpec(), parameters=str(previous.path)
    ).verify()
    model = OmniQuantModel(str(llama), transform=TransformSpec(), parameters=str(previous.path))
    with pytest.raises(ConfigurationError, match=r"^model\.parameters: .* another model\.rotation, \{'residual'"):
        model.verify()


class TestActivationDtype:
    """Hidden states between blocks are stored as precisely as the model that computes them."""

    @pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
    def test_follows_the_checkpoint(self, llama: Path, tmp_path: Path, stored: torch.dtype) -> None:
        folder = Path(shutil.copytree(llama, tmp_path / "model"))
        weights = load_file(folder / "model.safetensors")
        save_file({name: weight.to(stored) for name, weight in weights.items()}, folder / "model.safetensors")
        expected = torch.bfloat16 if stored == torch.bfloat16 else torch.float32
        assert OmniQuantModel(str(folder)).activation_dtype == expected

    @pytest.mark.parametrize("name", ["float32", "bfloat16"])
    def test_unless_it_is_given(self, llama: Path, name: Literal["float32", "bfloat16"]) -> None:
        assert OmniQuantModel(str(llama), activation_dtype=name).activation_dtype == getattr(torch, name)
