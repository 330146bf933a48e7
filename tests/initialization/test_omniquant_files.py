"""Files of the original implementation, built here in its names and shapes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from omniquant_pl.checkpoint import SourceModel
from omniquant_pl.errors import ConfigurationError
from omniquant_pl.initialization.omniquant_files import OmniQuantStatistics
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.spec import ActivationSpec, TransformSpec, WeightSpec
from omniquant_pl.trainer import SequentialTrainer

SHAPES = {
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (32, 32),
    "self_attn.v_proj": (32, 32),
    "self_attn.o_proj": (32, 32),
    "mlp.gate_proj": (48, 32),
    "mlp.up_proj": (48, 32),
    "mlp.down_proj": (32, 48),
}
ENDS = ("upbound_factor", "lowbound_factor")


def block(seed: int, group_size: int | None = None, let: bool = True) -> dict[str, Tensor]:
    """One block's factors as the original writes them."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, (out_features, in_features) in SHAPES.items():
        groups = 1 if group_size is None else -(-in_features // group_size)
        for end in ENDS:
            bound = 3 + torch.rand(out_features * groups, 1, generator=generator)
            factors[f"{name}.weight_quantizer.{end}"] = bound
    for pair in ("qkv", "out", "fc1") if let else ():
        factors[f"{pair}_smooth_scale"] = 0.5 + torch.rand(32, generator=generator)
        factors[f"{pair}_smooth_shift"] = torch.zeros(32)
    if let:
        factors["qkt_smooth_scale"] = 0.5 + torch.rand(32, generator=generator)
    return factors


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    def save(content: Any) -> Path:
        torch.save(content, tmp_path / "omni_parameters.pth")
        return tmp_path / "omni_parameters.pth"

    return save


def fake_quantized(weight: Tensor, upper: Tensor, lower: Tensor, group_size: int) -> Tensor:
    """The original's weight quantizer, 4 bit, written from its formula."""
    rows = weight.reshape(-1, group_size)
    low = torch.sigmoid(lower) * rows.amin(1, keepdim=True)
    high = torch.sigmoid(upper) * rows.amax(1, keepdim=True)
    scale = (high - low) / 15
    zero = (-low / scale).round()
    return (((rows / scale).round() + zero).clamp(0, 15) - zero).mul(scale).reshape(weight.shape)


@pytest.mark.parametrize("group_size", [None, 16])
def test_folding_gives_the_originals_weights(llama: Path, saved: Callable[..., Path], group_size: int | None) -> None:
    content = {index: block(index, group_size) for index in range(2)}
    model = OmniQuantModel(
        str(llama),
        WeightSpec(4, group_size, scale_dtype="float32"),
        ActivationSpec(4),
        transform=TransformSpec(),
        parameters=str(saved(content)),
    )
    source, theirs = SourceModel(llama), content[1]
    tensors = source.block_tensors(1)
    found = model.block(1, tensors, source.calls(8)[1], {}).factors.fold(tensors).tensors

    def expected(name: str, weight: Tensor) -> Tensor:
        upper, lower = (theirs[f"{name}.weight_quantizer.{end}"] for end in ENDS)
        return fake_quantized(weight, upper, lower, group_size or weight.shape[1])

    qkv, out, fc1 = (theirs[f"{pair}_smooth_scale"] for pair in ("qkv", "out", "fc1"))
    weights = {name: tensors[f"{name}.weight"] for name in SHAPES}
    per_channel = theirs["qkt_smooth_scale"]  # free in every channel: kept, though it does not commute with rotation
    transformed = {
        "self_attn.q_proj": weights["self_attn.q_proj"] * qkv / per_channel[:, None],
        "self_attn.k_proj": weights["self_attn.k_proj"] * qkv * per_channel[:, None],
        "self_attn.v_proj": weights["self_attn.v_proj"] * qkv / out[:, None],
        "self_attn.o_proj": weights["self_attn.o_proj"] * out,
        "mlp.gate_proj": weights["mlp.gate_proj"] * fc1,
        "mlp.up_proj": weights["mlp.up_proj"] * fc1,
        "mlp.down_proj": weights["mlp.down_proj"],
    }
    for name, weight in transformed.items():
        error = (found[f"{name}.weight"] - expected(name, weight)).abs()
        assert (error > 1e-5).float().mean() < 2e-3, name  # a rounding boundary may fall to either side
    assert torch.allclose(found["input_layernorm.weight"], tensors["input_layernorm.weight"] / qkv)
    assert torch.allclose(found["post_attention_layernorm.weight"], tensors["post_attention_layernorm.weight"] / fc1)


def test_no_epochs_keep_its_factors(
    llama: Path, saved: Callable[..., Path], fit: Callable[..., SequentialTrainer]
) -> None:
    content = {index: block(index, let=False) for index in range(2)}
    folder = fit(OmniQuantModel(str(llama), parameters=str(saved(content))), max_epochs=0).run_folder
    kept = folder.load_factors(1)["mlp.up_proj.clip.lower"]
    assert torch.equal(kept, content[1]["mlp.up_proj.weight_quantizer.lowbound_factor"])


class TestRefused:
    def message(self, llama: Path, path: Path, **settings: Any) -> str:
        with pytest.raises(ConfigurationError) as caught:
            OmniQuantModel(str(llama), parameters=str(path), **settings).verify()
        return str(caught.value)

    def test_a_block_that_is_missing(self, llama: Path, saved: Callable[..., Path]) -> None:
        assert "model.parameters: " in (found := self.message(llama, saved({0: block(0)})))
        assert found.endswith("has no factors of block 1")

    def test_factors_of_the_transformation_without_it(self, llama: Path, saved: Callable[..., Path]) -> None:
        path = saved({index: block(index) for index in range(2)})
        assert "input_layernorm.scale differs" in self.message(llama, path)

    def test_other_groups(self, llama: Path, saved: Callable[..., Path]) -> None:
        path = saved({index: block(index, 16, let=False) for index in range(2)})
        assert ".clip.lower differs" in self.message(llama, path)

    def test_an_unknown_factor(self, llama: Path, saved: Callable[..., Path]) -> None:
        path = saved({index: block(index) | {"fc2_smooth_scale": torch.ones(48)} for index in range(2)})
        assert "unknown factor fc2_smooth_scale" in self.message(llama, path, transform=TransformSpec())

    def test_a_shift_that_this_family_cannot_have(self, llama: Path, saved: Callable[..., Path]) -> None:
        path = saved({index: block(index) | {"qkv_smooth_shift": torch.ones(32)} for index in range(2)})
        assert "input_layernorm.shift differs" in self.message(llama, path, transform=TransformSpec())

    def test_clipping_of_a_weight_with_other_channels(self, llama: Path, saved: Callable[..., Path]) -> None:
        name = "self_attn.q_proj.weight_quantizer.upbound_factor"
        path = saved({index: block(index, let=False) | {name: torch.ones(33, 1)} for index in range(2)})
        assert f"{name} of shape (33, 1), for 32 channels" in self.message(llama, path)

    @pytest.mark.parametrize("factors", [{3: torch.ones(1)}, {"qkv_smooth_scale": [1.0]}], ids=["name", "factor"])
    def test_what_is_no_factor(self, llama: Path, saved: Callable[..., Path], factors: Any) -> None:
        assert "which is no factor" in self.message(llama, saved(dict.fromkeys(range(2), factors)))

    @pytest.mark.parametrize("content", [[1, 2], {0: [1]}], ids=["list", "no-factors"])
    def test_other_content(self, llama: Path, saved: Callable[..., Path], content: Any) -> None:
        assert "model.parameters: " in self.message(llama, saved(content))

    def test_a_pickle_of_other_things_is_not_loaded(self, llama: Path, saved: Callable[..., Path]) -> None:
        assert "cannot be read as tensors alone" in self.message(llama, saved({0: Path("x")}))

    def test_a_damaged_file(self, llama: Path, tmp_path: Path) -> None:
        (tmp_path / "bad.pth").write_bytes(b"PK\x03\x04 not a file")
        assert "cannot be read" in self.message(llama, tmp_path / "bad.pth")

    def test_nowhere(self, llama: Path, tmp_path: Path) -> None:
        assert "there is no file" in self.message(llama, tmp_path / "nowhere.pth")


class TestStatistics:
    @pytest.fixture
    def files(self, tmp_path: Path) -> tuple[Path, Path]:
        generator = torch.Generator().manual_seed(0)
        names = [f"model.layers.{i}.{name}" for i in range(2) for name in SHAPES]
        widths = {name: 48 if "down" in name else 32 for name in names}
        scales = {name: 1 + torch.rand(width, generator=generator) for name, width in widths.items()}
        shifts = {name: torch.rand(width, generator=generator) - 0.5 for name, width in widths.items()}
        torch.save(scales, tmp_path / "scales.pt")
        torch.save(shifts, tmp_path / "shifts.pt")
        return tmp_path / "scales.pt", tmp_path / "shifts.pt"

    def test_ranges_have_the_magnitudes_and_middles_of_the_files(self, files: tuple[Path, Path]) -> None:
        found = OmniQuantStatistics(*files).ranges("model.layers.1.", SHAPES)
        scales, shifts = (torch.load(path, weights_only=True) for path in files)
        assert set(found) == set(SHAPES)
        for name, channels in found.items():
            torch.testing.assert_close(channels.magnitude, scales[f"model.layers.1.{name}"])
            torch.testing.assert_close(channels.middle, shifts[f"model.layers.1.{name}"])
            assert (channels.low <= channels.high).all()

    def test_scales_start_from_them(
        self, llama: Path, files: tuple[Path, Path], fit: Callable[..., SequentialTrainer]
    ) -> None:
        transform = TransformSpec(alpha=0.75, scales=str(files[0]))
        folder = fit(OmniQuantModel(str(llama), transform=transform), max_epochs=0).run_folder
        tensors = SourceModel(llama).block_tensors(0)
        magnitude = torch.load(files[0], weights_only=True)["model.layers.0.self_attn.o_proj"]
        expected = magnitude**0.75 / tensors["self_attn.o_proj.weight"].abs().amax(0) ** 0.25
        torch.testing.assert_close(folder.load_factors(0)["self_attn.v_proj.scale"], expected)

    def test_of_another_model_are_refused(self, llama: Path, tmp_path: Path) -> None:
        for content, reason in (
            ({"model.decoder.layers.0.fc1": torch.ones(32)}, r"no linear whose name begins with model\.layers\.0\."),
            ({"model.layers.0.mlp.up_proj": torch.ones(31)}, r"model\.layers\.0\.mlp\.up_proj has \(31,\) channels"),
        ):
            torch.save(content, tmp_path / "scales.pt")
            model = OmniQuantModel(str(llama), transform=TransformSpec(scales=str(tmp_path / "scales.pt")))
            with pytest.raises(ConfigurationError, match=rf"^model\.transform\.scales: .*{reason}"):
                model.verify()

    @pytest.mark.parametrize(("kind", "vector"), [("scales", [1.0]), ("shifts", [1.0]), ("shifts", torch.ones(3))])
    def test_what_is_no_vector_of_the_channels(self, files: tuple[Path, Path], kind: str, vector: Any) -> None:
        path, name = files[("scales", "shifts").index(kind)], "model.layers.0.self_attn.q_proj"
        torch.save(torch.load(path, weights_only=True) | {name: vector}, path)
        with pytest.raises(ConfigurationError, match=rf"^model\.transform\.{kind}: .*{re.escape(name)}"):
            OmniQuantStatistics(*files)

    def test_shifts_alone_are_refused(self) -> None:
        with pytest.raises(ConfigurationError, match=r"^model\.transform\.shifts: "):
            TransformSpec(shifts="shifts.pt")
