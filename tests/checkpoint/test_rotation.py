"""A rotated model is the same function, with other weights, all the way to the exported folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from kept_blocks import KeepBlocks
from omniquant_pl.callbacks import MetricsCallback
from omniquant_pl.checkpoint import SourceModel
from omniquant_pl.checkpoint.rotation import RandomHadamard
from omniquant_pl.errors import ConfigurationError
from omniquant_pl.export import HfExport
from omniquant_pl.families import family_of, layout, register
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.spec import RotationSpec, TransformSpec, WeightSpec
from omniquant_pl.trainer import SequentialTrainer

TINY: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "vocab_size": 64,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
BIASES = {"attention_bias": True, "mlp_bias": True}
MIXTURE = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}

ROTATED: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**TINY),
    "llama-mha-biases": LlamaConfig(**(TINY | {"num_key_value_heads": 4}), **BIASES),
    "llama-mqa-tied-biases": LlamaConfig(**(TINY | {"num_key_value_heads": 1, "tie_word_embeddings": True}), **BIASES),
    "llama-wide-heads": LlamaConfig(**TINY, head_dim=20),
    "mistral": MistralConfig(**TINY, head_dim=16, sliding_window=8),
    "qwen2": Qwen2Config(**(TINY | {"tie_word_embeddings": True})),
    "qwen3": Qwen3Config(**TINY, head_dim=16),
    "phi3": Phi3Config(**TINY),
    "gemma": GemmaConfig(**(TINY | {"tie_word_embeddings": True}), head_dim=16),
    "mixtral": MixtralConfig(**TINY, num_local_experts=4),
    "qwen2-moe": Qwen2MoeConfig(**TINY, **MIXTURE, shared_expert_intermediate_size=40),
    "qwen3-moe": Qwen3MoeConfig(**TINY, **MIXTURE, head_dim=16, mlp_only_layers=[1]),
}
WINDOWED = {"head_dim": 16, "sliding_window": 8}
VALUES_ONLY: dict[str, PretrainedConfig] = {
    "opt": OPTConfig(**TINY, ffn_dim=40, word_embed_proj_dim=48),
    "falcon": FalconConfig(**TINY, new_decoder_architecture=True, num_kv_heads=2, bias=True),
    "phi": PhiConfig(**TINY),
    "gemma2": Gemma2Config(**TINY, **WINDOWED),
    "gemma3": Gemma3TextConfig(**TINY, **WINDOWED),
}


def save(config: PretrainedConfig, folder: Path) -> Path:
    """Saves a random model; norms and biases are random as well, and all blocks do something."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
            else:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    return folder


def streams(source: SourceModel, tokens: Tensor) -> list[Tensor]:
    """Input of the first block and output of every one."""
    hidden = [source.embed(tokens)]
    with torch.no_grad():
        for index, call in enumerate(source.calls(tokens.shape[1])):
            hidden.append(call(source.make_block(index, source.block_tensors(index)), hidden[-1]))
    return hidden


def logits(source: SourceModel, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return source.logits(streams(source, tokens)[-1])


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


class TestRandomHadamard:
    @pytest.mark.parametrize("size", [1, 2, 48, 64, 96, 192, 896, 3584, 5120, 2304, 2880, 3840, 92, 6, 7, 30])
    def test_orthogonal(self, size: int) -> None:
        matrix = RandomHadamard(size, 0)(torch.eye(size)).double()
        chosen = torch.randperm(size, generator=torch.Generator().manual_seed(0))[:32]
        for product in (matrix[chosen] @ matrix.T, matrix.T[chosen] @ matrix):
            torch.testing.assert_close(product, torch.eye(size, dtype=torch.float64)[chosen], rtol=0, atol=1e-6)

    @pytest.mark.parametrize("size", [1, 12, 20, 28, 36, 60, 84, 104, 6656, 48, 192, 896, 1536, 3584, 5120])
    def test_entries_have_one_magnitude(self, size: int) -> None:
        """Only so is a single large channel spread evenly over all."""
        matrix = RandomHadamard(size, 0)(torch.eye(size))
        torch.testing.assert_close(matrix.abs() * size**0.5, torch.ones(size, size))

    def test_seeds(self) -> None:
        one, same, other = (RandomHadamard(48, seed)(torch.eye(48)) for seed in (1, 1, 2))
        assert torch.equal(one, same)
        assert 0.2 < (one != other).float().mean() < 0.8

    def test_many_rows_in_parts(self) -> None:
        """More rows than are turned at a time, several parts in a row, channels scaled first."""
        turn = RandomHadamard(12, 3)
        states = torch.randn(700, 3, 24, generator=torch.Generator().manual_seed(0))
        scale = torch.rand(12, generator=torch.Generator().manual_seed(1)) + 0.5
        matrix = turn(torch.eye(12)).double()
        parts = [part.double() @ torch.diag(scale.double()) @ matrix for part in states.split(12, dim=-1)]
        torch.testing.assert_close(turn(states, scale), torch.cat(parts, -1).float())
        assert turn(states).dtype == torch.float32


class TestFunction:
    @pytest.mark.parametrize("spec", [RotationSpec(), RotationSpec(values=False, seed=7)], ids=["both", "residual"])
    @pytest.mark.parametrize("config", ROTATED.values(), ids=ROTATED)
    def test_logits_stay_and_the_stream_turns(
        self,
        config: PretrainedConfig,
        spec: RotationSpec,
        tokens: Tensor,
        logits_of: Callable[..., Tensor],
        tmp_path: Path,
    ) -> None:
        folder = save(config, tmp_path / "source")
        plain, rotated = SourceModel(folder), SourceModel(folder, rotation=spec)
        assert relative_error(logits(rotated, tokens), logits_of(folder, tokens)) <= 1e-5
        matrix = RandomHadamard(config.hidden_size, spec.seed)(torch.eye(config.hidden_size))
        for found, expected in zip(streams(rotated, tokens), streams(plain, tokens), strict=True):
            assert relative_error(found, expected @ matrix) <= 1e-5
            assert relative_error(found, expected) > 0.5

    @pytest.mark.parametrize("config", [*ROTATED.values(), *VALUES_ONLY.values()], ids=[*ROTATED, *VALUES_ONLY])
    def test_values_alone(
        self, config: PretrainedConfig, tokens: Tensor, logits_of: Callable[..., Tensor], tmp_path: Path
    ) -> None:
        folder = save(config, tmp_path / "source")
        plain, rotated = SourceModel(folder), SourceModel(folder, rotation=RotationSpec(residual=False))
        assert relative_error(logits(rotated, tokens), logits_of(folder, tokens)) <= 1e-5
        before, after = plain.block_tensors(1), rotated.block_tensors(1)
        changed = {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])}
        names = {"v_proj", "o_proj"}, {"v_proj", "out_proj"}, {"qkv_proj", "o_proj"}, {"v_proj", "dense"}
        assert changed in (*names, {"query_key_value", "dense"})
        assert rotated.config_json == plain.config_json

    def test_norms_are_left_without_factors(self, tmp_path: Path) -> None:
        for name, factor in (("llama", 1.0), ("gemma", 0.0)):
            source = SourceModel(save(ROTATED[name], tmp_path / name), rotation=RotationSpec())
            norms = {key: tensor for key, tensor in source.block_tensors(0).items() if "layernorm" in key}
            norms |= {key: tensor for key, tensor in source.non_block_tensors() if key == "model.norm.weight"}
            assert len(norms) == 3
            assert all(torch.equal(tensor, torch.full((48,), factor)) for tensor in norms.values())

    def test_outlier_channels_are_spread(self, make_llama: Callable[..., Path], tokens: Tensor) -> None:
        """What it is for: a channel that dwarfs the others is one like the others afterwards."""
        folder = make_llama()
        tensors = load_file(folder / "model.safetensors")
        tensors["model.embed_tokens.weight"][:, 5] *= 100
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        plain, rotated = SourceModel(folder), SourceModel(folder, rotation=RotationSpec())
        before, after = (source.embed(tokens) for source in (plain, rotated))
        peaks = [float((states.abs().amax(-1) / states.square().mean(-1).sqrt()).mean()) for states in (before, after)]
        assert peaks[0] > 5  # of sqrt(32), if there were nothing but that channel
        assert peaks[1] < 1.5


def rotated_model(folder: Path, **changes: Any) -> OmniQuantModel:
    return OmniQuantModel(str(folder), **({"weights": WeightSpec(4, 16), "rotation": RotationSpec()} | changes))


class TestExport:
    @pytest.mark.parametrize("config", ROTATED.values(), ids=ROTATED)
    def test_transformers_computes_the_calibrated_logits(
        self,
        config: PretrainedConfig,
        fit: Callable[..., SequentialTrainer],
        logits_of: Callable[..., Tensor],
        tokens: Tensor,
        tmp_path: Path,
    ) -> None:
        folder, keep = save(config, tmp_path / "source"), KeepBlocks()
        model = rotated_model(folder, transform=TransformSpec(mlp=True))
        HfExport().write(model, fit(model, [keep]).run_folder, tmp_path / "out")
        calibrated, loaded = keep.logits(model, tokens), logits_of(tmp_path / "out", tokens)
        assert relative_error(loaded, calibrated) <= 1e-5
        assert relative_error(loaded, logits_of(folder, tokens)) > 1e-3

    @pytest.mark.parametrize("base", [False, True], ids=["whole", "without-head"])
    def test_tied_models_come_out_untied(
        self,
        make_llama: Callable[..., Path],
        fit: Callable[..., SequentialTrainer],
        logits_of: Callable[..., Tensor],
        tokens: Tensor,
        tmp_path: Path,
        base: bool,
    ) -> None:
        folder = make_llama(tie_word_embeddings=True)
        if base:
            LlamaForCausalLM.from_pretrained(folder).model.save_pretrained(tmp_path / "base")
            folder = tmp_path / "base"
        model = rotated_model(folder, weights=WeightSpec(8))
        run = fit(model, [MetricsCallback()], max_epochs=0).run_folder
        HfExport(shard_bytes=20_000).write(model, run, tmp_path / "out")
        files = sorted((tmp_path / "out").glob("*.safetensors"))
        assert len(files) > 2
        exported: dict[str, Tensor] = {}
        for file in files:
            exported |= load_file(file)
        before = load_file(folder / "model.safetensors")
        assert set(exported) == {*before, "lm_head.weight"}
        embedding = next(tensor for name, tensor in exported.items() if name.endswith("embed_tokens.weight"))
        assert not torch.allclose(exported["lm_head.weight"], embedding, atol=0.1)
        assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
        assert "Hadamard" in (tmp_path / "out" / "README.md").read_text()
        assert relative_error(logits_of(tmp_path / "out", tokens), logits_of(folder, tokens)) < 0.05
        sizes = run.read_metrics()["size_bytes"]
        assert sizes["full_precision"] == sum(tensor.nbytes for tensor in before.values())
        others = [tensor for name, tensor in exported.items() if "_proj" not in name]
        codes = [tensor for name, tensor in exported.items() if "_proj" in name]
        scales = sum(len(tensor) for tensor in codes) * 3  # two bytes and a code for the zero point
        assert sizes["quantized"] == sum(t.nbytes for t in others) + sum(t.numel() for t in codes) + scales

    def test_values_alone_stay_tied(
        self,
        make_llama: Callable[..., Path],
        fit: Callable[..., SequentialTrainer],
        logits_of: Callable[..., Tensor],
        tokens: Tensor,
        tmp_path: Path,
    ) -> None:
        folder = make_llama(tie_word_embeddings=True)
        model = rotated_model(folder, weights=WeightSpec(8), rotation=RotationSpec(residual=False))
        HfExport().write(model, fit(model, max_epochs=0).run_folder, tmp_path / "out")
        before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
        assert set(before) == set(after)
        assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
        assert relative_error(logits_of(tmp_path / "out", tokens), logits_of(folder, tokens)) < 0.05


def test_baselines_are_those_of_the_model_as_it_is(
    make_llama: Callable[..., Path], fit: Callable[..., SequentialTrainer], tmp_path: Path
) -> None:
    folder = make_llama(tie_word_embeddings=True)
    measured: list[Mapping[str, float]] = []
    for name, rotation in (("plain", None), ("rotated", RotationSpec())):
        model = rotated_model(folder, rotation=rotation, clipping=None)
        trainer = fit(model, [MetricsCallback()], max_epochs=0, default_root_dir=tmp_path / name)
        measured.append(trainer.run_folder.read_metrics()["perplexity"]["evaluation"])
    plain, rotated = measured
    assert rotated["full_precision"] == pytest.approx(plain["full_precision"], rel=1e-5)
    assert rotated["round_to_nearest"] == plain["round_to_nearest"] == plain["quantized"]
    assert abs(rotated["quantized"] / plain["quantized"] - 1) > 1e-4


class TestRefused:
    @pytest.mark.parametrize("config", VALUES_ONLY.values(), ids=VALUES_ONLY)
    def test_other_residual_streams(
        self, config: PretrainedConfig, fit: Callable[..., SequentialTrainer], tmp_path: Path
    ) -> None:
        folder = save(config, tmp_path / "source")
        with pytest.raises(
            ConfigurationError, match=r"^model\.rotation: .*RMSNorms.* model\.rotation\.residual: false"
        ):
            fit(rotated_model(folder))
        assert not (tmp_path / "run").exists()

    @pytest.fixture
    def altered(self, monkeypatch: pytest.MonkeyPatch, llama: Path) -> Callable[..., SourceModel]:
        """Opens a LLaMA of which the layout is told differently."""
        monkeypatch.setattr(layout, "_FAMILIES", dict(layout._FAMILIES))

        def opened(spec: RotationSpec, **changes: Any) -> SourceModel:
            family = family_of(LlamaConfig())
            block = replace(family.block(None, 0), **changes)
            register("llama", family, block=lambda config, index: block)
            return SourceModel(llama, rotation=spec)

        return opened

    @pytest.mark.parametrize(
        ("writers", "named"),
        [
            ((), r"mlp\.down_proj"),
            (("mlp.down_proj",), r"self_attn\.o_proj"),
            (("mlp.down_proj", "self_attn.dense", "self_attn.o_proj"), r"self_attn\.dense"),
        ],
    )
    def test_layouts_that_miss_a_matrix(
        self, altered: Callable[..., SourceModel], writers: tuple[str, ...], named: str
    ) -> None:
        with pytest.raises(ConfigurationError, match=rf"^model\.rotation: {named} is neither"):
            altered(RotationSpec(), writers=writers)

    def test_norms_with_biases(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """A LayerNorm takes the mean away, which no rotation leaves as it is."""
        monkeypatch.setattr(layout, "_FAMILIES", dict(layout._FAMILIES))
        config = VALUES_ONLY["opt"]
        family = family_of(config)
        block = replace(family.block(config, 0), writers=("self_attn.out_proj", "fc2"))
        register("opt", family, block=lambda config, index: block, head=family_of(LlamaConfig()).head)
        with pytest.raises(ConfigurationError, match=r"^model\.rotation: self_attn_layer_norm is neither"):
            SourceModel(save(config, tmp_path / "source"), rotation=RotationSpec())

    def test_blocks_without_values(self, altered: Callable[..., SourceModel]) -> None:
        with pytest.raises(ConfigurationError, match=r"^model\.rotation: not every block has values"):
            altered(RotationSpec(residual=False), pairs=())

    @pytest.mark.parametrize("setting", ["parameters", "scales"])
    def test_files_of_the_original(self, llama: Path, tmp_path: Path, setting: str) -> None:
        """What they hold belongs to channels that no longer are."""
        path = str(tmp_path / "file.pth")
        torch.save({index: {} for index in range(2)}, path)
        transform = TransformSpec(scales=path) if setting == "scales" else None
        parameters = path if setting == "parameters" else None
        model = rotated_model(llama, parameters=parameters, transform=transform)
        with pytest.raises(ConfigurationError, match=r"^model\.rotation: .*file\.pth"):
            model.verify()

    def test_shapes_are_looked_at_first(self, llama: Path, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(llama, tmp_path / "copy"))
        tensors = load_file(folder / "model.safetensors")
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:, :-1].contiguous()
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(ConfigurationError, match=r"^model\.path: .*model\.embed_tokens\.weight has shape"):
            SourceModel(folder, rotation=RotationSpec())

    def test_settings(self) -> None:
        with pytest.raises(ConfigurationError, match=r"^model\.rotation: neither"):
            RotationSpec(residual=False, values=False)
        with pytest.raises(ConfigurationError, match=r"^model\.rotation\.seed: -1 is below 0"):
            RotationSpec(seed=-1)
