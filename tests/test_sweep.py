"""Random settings of every family: each run ends with finite results, or is refused by the key of a setting.

Everything is drawn from the number in a test's name: ``pytest tests/test_sweep.py -k "17-"`` runs it again. There are
40 numbers by default, which reach every model; ``OMNIQUANT_SWEEP=400`` in the environment makes them 400.
"""

from __future__ import annotations

import json
import logging
import math
import os
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
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
from omniquant_pl.blocks.quantized_block import QuantizedBlock
from omniquant_pl.callbacks import FoldCallback, KeepBestState, MetricsCallback, NumericsGuard, ReportCallback
from omniquant_pl.data import CalibrationData
from omniquant_pl.errors import CalibrationError, ConfigurationError
from omniquant_pl.export import HfExport
from omniquant_pl.families import family_of, registered_families
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.spec import (
    ActivationSpec,
    ClippingSpec,
    LearningSpec,
    ObjectiveSpec,
    RotationSpec,
    RoundingSpec,
    ScheduleSpec,
    TransformSpec,
    WeightSpec,
    WindowSpec,
)
from omniquant_pl.trainer import SequentialTrainer

SHORT = 40
"""Numbers that are quick enough for every day."""
RUNS = int(os.environ.get("OMNIQUANT_SWEEP", SHORT))
WINDOWS, TOKENS, VOCABULARY = 6, 16, 64
Settings = dict[str, Any]
"""Values by their keys in YAML."""

# ---- models ------------------------------------------------------------------------------------

TINY: Settings = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 32,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
}
PHI = TINY | {"num_attention_heads": 2, "num_key_value_heads": 2}
PLAIN = {name: value for name, value in TINY.items() if name not in ("num_key_value_heads", "intermediate_size")}
OPT = PLAIN | {"ffn_dim": 48, "word_embed_proj_dim": 32}
FALCON = PLAIN | {"hidden_size": 48, "num_attention_heads": 3, "ffn_hidden_size": 64}
FALCON_40B = FALCON | {"hidden_size": 64, "num_attention_heads": 4, "num_kv_heads": 2, "new_decoder_architecture": True}
GEMMA = TINY | {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}
MOE = TINY | {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0 + 0.1 * pair for pair in range(6)],
    "long_factor": [2.0 + 0.5 * pair for pair in range(6)],
}
VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 16,
    "patch_size": 4,
}


@dataclass(frozen=True)
class Variant:
    """A tiny model of a family."""

    kind: type[PretrainedConfig]
    settings: Settings
    internlm: str | None = None
    """Which InternLM's checkpoint it is written as."""

    @property
    def model_type(self) -> str:
        return self.internlm or self.kind.model_type

    def config(self, blocks: int) -> PretrainedConfig:
        settings = self.settings | {"num_hidden_layers": blocks}
        if self.kind is Gemma3Config:
            return Gemma3Config(
                text_config=settings, vision_config=VISION, mm_tokens_per_image=4, image_token_index=VOCABULARY - 1
            )
        return self.kind(**settings)


VARIANTS = {
    "llama": Variant(LlamaConfig, TINY | {"tie_word_embeddings": False}),
    "llama-biases-tied": Variant(
        LlamaConfig, TINY | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}
    ),
    "llama-mqa": Variant(LlamaConfig, TINY | {"num_key_value_heads": 1, "head_dim": 12, "intermediate_size": 40}),
    "mistral": Variant(MistralConfig, TINY | {"head_dim": 16, "sliding_window": 8}),
    "qwen2": Variant(Qwen2Config, TINY | {"tie_word_embeddings": True}),
    "qwen2-sliding": Variant(
        Qwen2Config, TINY | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    ),
    "qwen3": Variant(Qwen3Config, TINY | {"head_dim": 16}),
    "qwen3-biases": Variant(Qwen3Config, TINY | {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True}),
    "mixtral": Variant(MixtralConfig, TINY | {"intermediate_size": 24, "num_local_experts": 3}),
    "mixtral-one": Variant(
        MixtralConfig, TINY | {"intermediate_size": 20, "num_local_experts": 4, "num_experts_per_tok": 1}
    ),
    "qwen2-moe": Variant(Qwen2MoeConfig, MOE | {"shared_expert_intermediate_size": 20}),
    "qwen3-moe": Variant(Qwen3MoeConfig, MOE | {"head_dim": 16, "norm_topk_prob": True}),
    "qwen3-moe-dense": Variant(Qwen3MoeConfig, MOE | {"head_dim": 8, "mlp_only_layers": [0], "attention_bias": True}),
    "phi3": Variant(Phi3Config, PHI | {"sliding_window": 8}),
    "phi3-gqa": Variant(Phi3Config, TINY | {"head_dim": 16}),
    "phi4-mini": Variant(
        Phi3Config,
        PHI
        | {
            "num_key_value_heads": 1,
            "original_max_position_embeddings": 8,
            "tie_word_embeddings": True,
            "rope_parameters": LONG,
        },
    ),
    "phi": Variant(PhiConfig, PHI),
    "phi-partial": Variant(
        PhiConfig,
        PHI | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.4}},
    ),
    "phi-normed": Variant(PhiConfig, TINY | {"num_key_value_heads": 4, "qk_layernorm": True}),
    "opt": Variant(OPTConfig, OPT),
    "opt-350m": Variant(OPTConfig, OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "galactica": Variant(OPTConfig, OPT | {"activation_function": "gelu", "enable_bias": False}),
    "falcon-7b": Variant(FalconConfig, FALCON),
    "falcon-40b": Variant(FalconConfig, FALCON_40B | {"tie_word_embeddings": False}),
    "falcon-11b": Variant(FalconConfig, FALCON_40B | {"num_ln_in_parallel_attn": 1, "bias": True}),
    "falcon-rw": Variant(
        FalconConfig, FALCON | {"multi_query": False, "parallel_attn": False, "bias": True, "alibi": True}
    ),
    "falcon-7b-alibi": Variant(FalconConfig, FALCON | {"alibi": True, "bias": True}),
    "gemma": Variant(GemmaConfig, GEMMA),
    "gemma-mqa-biases": Variant(GemmaConfig, GEMMA | {"num_key_value_heads": 1, "attention_bias": True}),
    "gemma2": Variant(Gemma2Config, GEMMA | {"attn_logit_softcapping": 0.5}),
    "gemma2-biases": Variant(Gemma2Config, GEMMA | {"attention_bias": True, "final_logit_softcapping": None}),
    "gemma3-text": Variant(Gemma3TextConfig, GEMMA | {"sliding_window_pattern": 2}),
    "gemma3-text-capped": Variant(
        Gemma3TextConfig,
        GEMMA | {"attention_bias": True, "tie_word_embeddings": False, "final_logit_softcapping": 2.0},
    ),
    "gemma3": Variant(Gemma3Config, GEMMA | {"sliding_window_pattern": 2}),
    "internlm": Variant(LlamaConfig, TINY | {"attention_bias": True, "tie_word_embeddings": False}, "internlm"),
    "internlm2": Variant(LlamaConfig, TINY | {"tie_word_embeddings": False}, "internlm2"),
    "internlm3": Variant(
        LlamaConfig, TINY | {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": False}, "internlm3"
    ),
}
RMSNORM_STREAMS = {
    *("gemma", "internlm", "internlm2", "internlm3", "llama", "mistral", "mixtral", "phi3"),
    *("qwen2", "qwen2_moe", "qwen3", "qwen3_moe"),
}
"""Families whose residual stream is read through RMSNorms alone and written by linears: it can be rotated."""
OTHER_STREAMS = {"falcon", "gemma2", "gemma3", "gemma3_text", "opt", "phi"}
"""Those with a LayerNorm, or with a norm behind the sublayers."""


def save_model(variant: Variant, blocks: int, folder: Path) -> None:
    """Saves a random model, its norms and biases random as well."""
    config = variant.config(blocks)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(blocks)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
            elif parameter.std() < 0.05 and "embed" not in name:  # so that blocks do something
                parameter.normal_(std=0.2)
        model.save_pretrained(folder)
    if variant.internlm is not None:
        write_as_internlm(folder, variant.internlm, config)


INTERNLM2_NAMES = {
    "embed_tokens": "tok_embeddings",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "lm_head": "output",
}


def write_as_internlm(folder: Path, model_type: str, config: PretrainedConfig) -> None:
    """Rewrites a LLaMA's folder as InternLM's code has it."""
    content = json.loads((folder / "config.json").read_text())
    names = (*TINY, "num_hidden_layers", "rms_norm_eps", "hidden_act", "tie_word_embeddings")
    changed = {name: content[name] for name in names} | {"model_type": model_type, "bias": config.attention_bias}
    (folder / "config.json").write_text(json.dumps(changed))
    if model_type != "internlm2":
        return
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "q_proj" in name]:
        heads = (config.num_key_value_heads, -1, config.hidden_size // config.num_attention_heads, config.hidden_size)
        parts = [tensors.pop(name.replace("q_proj", f"{kind}_proj")).view(heads) for kind in "qkv"]
        fused = torch.cat(parts, dim=1).reshape(-1, config.hidden_size)
        tensors[name.replace("self_attn.q_proj", "attention.wqkv")] = fused
    for own, other in INTERNLM2_NAMES.items():
        tensors = {name.replace(own, other): tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


Change = Callable[[str, Tensor, random.Random], Tensor]
"""Takes the name of a tensor, the tensor and a source of chance, and returns what is stored instead."""


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a model with some blocks; saved once, unless something about it is changed."""
    folders: dict[tuple[str, int], Path] = {}

    def checkpoint(name: str, blocks: int, change: Change | None = None) -> Path:
        if (name, blocks) not in folders:
            folders[name, blocks] = tmp_path_factory.mktemp(name)
            save_model(VARIANTS[name], blocks, folders[name, blocks])
        if change is None:
            return folders[name, blocks]
        folder = tmp_path_factory.mktemp(f"{name}-changed")
        draws = random.Random(name)
        (folder / "config.json").write_bytes((folders[name, blocks] / "config.json").read_bytes())
        tensors = load_file(folders[name, blocks] / "model.safetensors")
        changed = {key: change(key, tensor.clone(), draws) for key, tensor in sorted(tensors.items())}
        save_file(changed, folder / "model.safetensors", {"format": "pt"})
        return folder

    return checkpoint


# ---- settings ----------------------------------------------------------------------------------

ON, OFF = "on", "off"
"""Of a section: with values of its own, or null."""
CHOICES: dict[str, Sequence[Any]] = {  # what stands there more than once is drawn more often
    "model.weights.bits": (2, 3, 4, 5, 6, 7, 8),
    "model.weights.group_size": (None, None, 1, 5, 8, 12, 16, 31, 32, 64, 4096),
    "model.weights.symmetric": (False, True),
    "model.weights.scale_dtype": ("float16", "float16", "bfloat16", "float32"),
    "model.activations": (OFF, OFF, ON),
    "model.activations.bits": (2, 3, 4, 5, 6, 7, 8),
    "model.activations.symmetric": (False, True),
    "model.clipping": (OFF, ON, ON, ON),
    "model.clipping.lr": (1e-3, 1e-2, 1e-1, 1.0),
    "model.clipping.initial": (4.0, 4.0, 0.0, 20.0, -3.0, 100.0),
    "model.clipping.search": (False, False, True),
    "model.transform": (OFF, ON, ON),
    "model.transform.lr": (1e-3, 5e-3, 1e-1, 1.0),
    "model.transform.alpha": (0.0, 0.5, 0.75, 1.0),
    "model.transform.initial": ("smoothquant", "search", "awq", "ones"),
    "model.transform.mlp": (False, True),
    "model.transform.shift": (None, False, True),
    "model.rotation": (OFF, OFF, OFF, ON),
    "model.rotation.residual": (True, True, False),
    "model.rotation.values": (True, True, True, False),
    "model.rotation.seed": (0, 7),
    "model.objective.aug_loss": (False, True),
    "model.objective.window.blocks": (1, 1, 2, 3),
    "model.objective.window.stride": (1,),
    "model.rounding.method": ("nearest", "learned", "gptq"),
    "model.rounding.lr": (1e-3, 1e-2, 1.0),
    "model.objective.output_loss": ("mse", "kl"),
    "model.learning.schedule.warmup": (0.0, 0.0, 0.2, 0.9),
    "model.learning.schedule.decay": ("none", "linear", "cosine"),
    "model.learning.weight_decay": (0.0, 0.0, 0.1, 1.0),
    "data.samples": (4, 5, 6),
    "data.batch_size": (1, 2, 4, 16),
    "data.shuffle": (False, True),
    "trainer.max_epochs": (0, 1, 1, 2),
    "trainer.precision": ("32-true", "32-true", "bf16-mixed"),
    "trainer.gradient_clip_val": (None, None, 1.0),
    "trainer.accumulate_grad_batches": (1, 1, 2),
    "trainer.limit_train_batches": (1.0, 1.0, 2),
}
SECTIONS = {
    "weights": WeightSpec,
    "activations": ActivationSpec,
    "clipping": ClippingSpec,
    "transform": TransformSpec,
    "rotation": RotationSpec,
    "rounding": RoundingSpec,
    "objective": ObjectiveSpec,
    "learning": LearningSpec,
}
NESTED = {"objective.window": WindowSpec, "learning.schedule": ScheduleSpec}
WRONG: dict[str, Sequence[Any]] = {
    "model.weights.bits": (1, 9, 16, -4),
    "model.weights.group_size": (0, -1, -128),
    "model.weights.bits_of.q_proj": (1, 9),
    "model.activations.bits": (1, 16),
    "model.clipping.lr": (0.0, -1e-2, 1.5, math.nan, math.inf),
    "model.clipping.initial": (math.nan, math.inf, 1e300, -101.0),
    "model.transform.lr": (0.0, 2.0, math.nan),
    "model.transform.alpha": (-0.1, 1.1, math.nan),
    "model.transform.shifts": ("act_shifts.pt",),
    "model.rotation.seed": (-1, 2**64),
    "model.objective.window.blocks": (0, -1),
    "model.objective.window.stride": (0, 4),
    "model.rounding.lr": (0.0, 1.5, math.nan),
    "model.learning.schedule.warmup": (-0.1, 1.0, 1.5, math.nan),
    "model.learning.weight_decay": (-0.1, math.nan, math.inf),
    "data.samples": (0, 100),
    "data.batch_size": (0,),
    "data.sequence_length": (0, 1, 33),
    "trainer.max_epochs": (-1,),
    "trainer.precision": ("16-mixed", "16-true", "bf16-true", "64-true"),
}
"""Values that have to be refused by their key, whatever else is set."""


def is_linear(name: str, tensor: Tensor) -> bool:
    return bool(re.search(r"\.(layers|h)\.\d+\.", name)) and tensor.ndim == 2 and "vision" not in name


def linear_kinds(folder: Path) -> list[str]:
    """Last parts of the names of a checkpoint's linears in blocks, without those of routers; InternLM's are LLaMA's."""
    stored = load_file(folder / "model.safetensors")
    kinds = {name.split(".")[-2] for name, tensor in stored.items() if is_linear(name, tensor)}
    if "wqkv" in kinds:
        kinds = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    routers = {"gate", "shared_expert_gate"}
    return sorted(kinds - routers)


def draw_settings(draws: random.Random, kinds: Sequence[str]) -> Settings:
    """Draws a value of every setting; of a section that is turned off, only that."""
    drawn: Settings = {}
    for key, values in CHOICES.items():
        section = key.rpartition(".")[0]
        if drawn.get(section) != OFF:
            drawn[key] = draws.choice(values)
    drawn["model.objective.window.stride"] = draws.randint(1, drawn["model.objective.window.blocks"])
    if draws.random() < 0.3:
        for kind in draws.sample(kinds, draws.randint(1, 2)):
            drawn[f"model.weights.bits_of.{kind}"] = draws.randint(2, 8)
    if draws.random() < 0.03:
        drawn["model.weights.bits_of.nothing"] = 4
    return drawn


def spoil(drawn: Settings, key: str, value: Any) -> Settings:
    """Sets a value, and turns the section on that it belongs to."""
    section = key.rpartition(".")[0]
    return {name: found for name, found in drawn.items() if name != section} | {key: value}


def section_of(drawn: Settings, prefix: str) -> Settings:
    return {key.removeprefix(prefix): value for key, value in drawn.items() if key.startswith(prefix)}


def make_model(path: Path, drawn: Settings) -> OmniQuantModel:
    options = {name: value for name, value in section_of(drawn, "model.").items() if "." not in name}
    for name, spec in SECTIONS.items():
        values = section_of(drawn, f"model.{name}.")
        bits_of = {key.removeprefix("bits_of."): values.pop(key) for key in list(values) if key.startswith("bits_of.")}
        if bits_of:
            values["bits_of"] = bits_of
        for place, nested in NESTED.items():
            owner, _, field = place.partition(".")
            if owner == name:
                inner = [key for key in values if key.startswith(f"{field}.")]
                values[field] = nested(**{key.removeprefix(f"{field}."): values.pop(key) for key in inner})
        options[name] = None if drawn.get(f"model.{name}") == OFF else spec(**values)
    return OmniQuantModel(str(path), **options)


def refusals(drawn: Settings, model_type: str) -> set[str]:
    """Keys by which valid settings have to be refused, because they do not go with the model."""
    keys = {key for key in drawn if key == "model.weights.bits_of.nothing"}
    if drawn["model.rotation"] == ON:
        residual, values = drawn["model.rotation.residual"], drawn["model.rotation.values"]
        if not (residual or values) or (residual and model_type in OTHER_STREAMS):
            keys.add("model.rotation")
    return keys


def accept(drawn: Settings, model_type: str) -> None:
    """Takes back what has to be refused."""
    for key in refusals(drawn, model_type):
        if key == "model.rotation":
            drawn[key] = OFF
        else:
            del drawn[key]


# ---- a run, and what it has to leave behind ----------------------------------------------------


@dataclass
class Run:
    """A model, settings and tokens; :meth:`fit` leaves the rest."""

    source: Path
    drawn: Settings
    folder: Path
    calibration: np.ndarray
    evaluation: np.ndarray
    callbacks: Sequence[Callback] = ()
    keep: KeepBlocks = field(default_factory=KeepBlocks)

    def fit(self) -> None:
        files = {}
        for name, tokens in (("calibration", self.calibration), ("evaluation", self.evaluation)):
            files[name] = str(self.folder / f"{name}.npy")
            np.save(files[name], tokens)
        self.model = make_model(self.source, self.drawn)
        self.trainer = SequentialTrainer(
            callbacks=[
                ReportCallback(),
                NumericsGuard(),
                FoldCallback(),
                MetricsCallback(),
                self.keep,
                *self.callbacks,
            ],
            default_root_dir=self.folder / "run",
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **section_of(self.drawn, "trainer."),
        )
        data = CalibrationData(
            dataset=files["calibration"], evaluation=[files["evaluation"]], **section_of(self.drawn, "data.")
        )
        self.trainer.fit(self.model, datamodule=data)
        HfExport().write(self.model, self.trainer.run_folder, self.exported)

    @property
    def exported(self) -> Path:
        return self.folder / "exported"

    def check(self) -> None:
        """What holds of every run."""
        self.check_numbers()
        self.check_files()
        self.check_statistics()
        for block in self.keep.blocks:
            self.check_codes(block)
        self.check_exported_weights()

    def check_statistics(self) -> None:
        """What the report shows of every block: all linears, each once, with numbers that are finite."""
        for block, layout in zip(self.keep.blocks, self.model.source.layouts, strict=True):
            kept = json.loads((self.trainer.run_folder.statistics / f"{block.index:05d}.json").read_text())
            nulls = {name.rpartition(".")[2] for name, value in numbers_in(kept) if value is None}
            assert nulls <= {"after", "median_after"}  # where nothing transforms
            # A divergence of nothing is zero but for the rounding of float32 logits.
            assert not [found for found in numbers_in(kept) if found[1] is not None and found[1] < -1e-6]
            linears = {re.sub(r"\.\d+(?=\.)", ".*", name) for name in layout.linears}
            readers = [name for each in kept["inputs"] for name in each["readers"]]
            assert len(readers) == len(set(readers))
            assert set(readers) <= linears  # experts that no token reached read nothing
            assert set(kept["clipping"]) in ({}.keys(), linears)

    def check_numbers(self) -> None:
        metrics = json.loads(self.trainer.run_folder.metrics.read_text())
        numbers = dict(numbers_in(metrics))
        assert len(metrics["blocks"]) == len(self.model.source) == len(self.keep.blocks)
        wrong = {name: value for name, value in numbers.items() if value is None or not math.isfinite(value)}
        assert not wrong
        for result in self.keep.results:
            assert 0 <= result.relative_error < 1e6
            assert 0 <= result.relative_error_rtn < 1e6
            assert result.epochs <= self.drawn["trainer.max_epochs"] * self.drawn["model.objective.window.blocks"]

    def check_files(self) -> None:
        files = sorted(self.trainer.run_folder.blocks.iterdir())
        assert len(files) == len(self.keep.blocks)
        for path in files:
            for name, factor in load_file(path).items():
                assert not factor.is_floating_point() or bool(torch.isfinite(factor).all()), (path, name)

    def check_codes(self, block: QuantizedBlock) -> None:
        for name, weight in block.quantized.items():
            kind = name.rpartition(".")[2]
            bits = self.drawn.get(f"model.weights.bits_of.{kind}", self.drawn["model.weights.bits"])
            symmetric = self.drawn["model.weights.symmetric"]
            lowest, highest = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
            assert lowest <= int(weight.codes.min()) <= int(weight.codes.max()) <= highest, name
            assert weight.scale.dtype == getattr(torch, self.drawn["model.weights.scale_dtype"])
            assert bool((weight.scale > 0).all()), name
            assert (weight.zero_point is None) == symmetric
            if weight.zero_point is not None:
                assert int(weight.zero_point.max()) <= highest, name
        for name, tensor in block.tensors.items():
            assert bool(torch.isfinite(tensor).all()), name

    def check_exported_weights(self) -> None:
        """What was exported is what the blocks computed with, bit for bit."""
        stored = load_file(self.exported / "model.safetensors")
        for index, block in enumerate(self.keep.blocks):
            names = self.model.source.stored_names(index)
            assert all(torch.equal(stored[names[name]], block.tensors[name]) for name in names)

    def check_logits(self) -> None:
        """What plain transformers computes from the export is what the calibrated blocks do with their inputs whole."""
        tokens, source = torch.from_numpy(self.evaluation), self.model.source
        calls, hidden = source.calls(tokens.shape[1]), source.embed(tokens)
        with torch.no_grad():
            for index, block in enumerate(self.keep.blocks):
                hidden = calls[index](source.make_block(index, block.tensors), hidden)
            calibrated = source.logits(hidden)
        found = self.exported_logits()
        assert float((found - calibrated).abs().max()) <= 1e-4 * float(calibrated.abs().max())
        if self.drawn["model.activations"] == OFF and self.drawn["trainer.precision"] == "32-true":
            losses = F.cross_entropy(found[:, :-1].double().flatten(0, 1), tokens[:, 1:].flatten())
            measured = self.trainer.run_folder.read_metrics()["perplexity"]["evaluation"]["quantized"]
            assert measured == pytest.approx(math.exp(float(losses)), rel=1e-3)

    def exported_logits(self) -> Tensor:
        attention = family_of(self.model.source.config).attention or "eager"
        network = AutoModelForCausalLM.from_pretrained(
            self.exported, dtype=torch.float32, attn_implementation=attention
        )
        with torch.no_grad():
            logits: Tensor = network.eval()(torch.from_numpy(self.evaluation)).logits
        assert bool(torch.isfinite(logits).all())
        return logits


def numbers_in(content: Any, name: str = "") -> Iterator[tuple[str, float | None]]:
    """Yields every number, and every null, of a JSON file with its place."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            yield from numbers_in(value, f"{name}.{key}")
    elif isinstance(content, list):
        for index, value in enumerate(content):
            yield from numbers_in(value, f"{name}.{index}")
    elif content is None or isinstance(content, int | float):
        yield name, content


def draw_tokens(draws: random.Random, windows: int) -> np.ndarray:
    """Token ids that every model has, without the padding and Gemma 3's image."""
    return np.random.default_rng(draws.getrandbits(32)).integers(2, VOCABULARY - 1, (windows, TOKENS))


def draw_callbacks(draws: random.Random) -> list[Callback]:
    callbacks: list[Callback] = []
    if draws.random() < 0.3:
        callbacks.append(KeepBestState())
    if draws.random() < 0.3:
        callbacks.append(EarlyStopping("loss", patience=1, min_delta=draws.choice((0.0, 1e9))))
    return callbacks


def draw_run(draws: random.Random, source: Path, folder: Path) -> Run:
    drawn = draw_settings(draws, linear_kinds(source))
    return Run(source, drawn, folder, draw_tokens(draws, WINDOWS), draw_tokens(draws, 2), draw_callbacks(draws))


def variant_of(number: int) -> str:
    return list(VARIANTS)[number % len(VARIANTS)]


# ---- degenerate models ----


def linears(change: Callable[[Tensor], Tensor]) -> Change:
    return lambda name, tensor, draws: change(tensor) if is_linear(name, tensor) else tensor


def norms(change: Callable[[Tensor], Tensor]) -> Change:
    is_norm = re.compile(r"\.(layers|h)\.\d+\..*(norm|ln_)\w*\.weight")
    return lambda name, tensor, draws: change(tensor) if is_norm.search(name) else tensor


def with_values(index: Any, value: float, tensor: Tensor) -> Tensor:
    tensor[index] = value
    return tensor


CHANGES: dict[str, Change] = {
    "zero-rows": linears(partial(with_values, slice(None, None, 3), 0.0)),
    "zero-columns": linears(partial(with_values, (slice(None), slice(5)), 0.0)),
    "zero-matrices": lambda name, tensor, draws: tensor * (not is_linear(name, tensor) or draws.random() < 0.5),
    "constant-rows": linears(lambda tensor: with_values(-1, -0.3, with_values(0, 0.7, tensor))),
    "constant-matrices": linears(lambda tensor: torch.full_like(tensor, 0.1)),
    "one-sign": linears(torch.abs),
    "huge": linears(lambda tensor: 1e4 * tensor),
    "tiny": linears(lambda tensor: 1e-8 * tensor),
    "subnormal": linears(lambda tensor: 1e-39 * tensor),
    "an-outlier": linears(partial(with_values, (0, 0), 1e4)),
    "a-channel-off": norms(lambda tensor: with_values(4, -1.0, with_values(3, 0.0, tensor))),
    "norms-off": norms(torch.zeros_like),
    "huge-norms": norms(lambda tensor: 1e3 * tensor),
    "embeddings-off": lambda name, tensor, draws: tensor * ("emb" not in name),
}


# ---- tests -------------------------------------------------------------------------------------


def test_every_family_takes_part() -> None:
    families = {variant.model_type for variant in VARIANTS.values()}
    assert families == set(registered_families())
    assert families == RMSNORM_STREAMS | OTHER_STREAMS


def test_every_value_is_drawn() -> None:
    kinds = ["q_proj", "down_proj"]
    drawn = [draw_settings(random.Random(number), kinds) for number in range(400)]
    for key, values in CHOICES.items():
        assert set(values) <= {settings[key] for settings in drawn if key in settings}, key
    assert any("model.weights.bits_of.down_proj" in settings for settings in drawn)


NUMBERS = [
    pytest.param(number, id=f"{number}-{variant_of(number)}", marks=[pytest.mark.slow] * (number >= SHORT))
    for number in range(RUNS)
]


@pytest.mark.parametrize("number", NUMBERS)
def test_drawn_settings(
    checkpoint: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    draws = random.Random(number)
    name = variant_of(number)
    run = draw_run(draws, checkpoint(name, draws.choice((1, 2, 2, 3))), tmp_path)
    print(run.drawn)
    expected = refusals(run.drawn, VARIANTS[name].model_type)
    if not expected and draws.random() < 0.05:
        key = draws.choice(list(WRONG))
        run.drawn, expected = spoil(run.drawn, key, draws.choice(WRONG[key])), {key}
    if expected:
        with pytest.raises(ConfigurationError) as refused:
            run.fit()
        assert refused.value.key in expected
        assert str(refused.value).startswith(f"{refused.value.key}: ")
        return
    with caplog.at_level(logging.WARNING, logger="omniquant_pl.callbacks.numerics"):
        run.fit()
    assert not [record for record in caplog.records if record.name == "omniquant_pl.callbacks.numerics"]
    run.check()
    run.check_logits()


@pytest.mark.parametrize("number", range(max(1, RUNS // SHORT)))
@pytest.mark.parametrize("change", CHANGES)
def test_degenerate_models(checkpoint: Callable[..., Path], tmp_path: Path, change: str, number: int) -> None:
    draws = random.Random(f"{change} {number}")
    name = draws.choice(list(VARIANTS))
    run = draw_run(draws, checkpoint(name, 2, CHANGES[change]), tmp_path)
    accept(run.drawn, VARIANTS[name].model_type)
    print(name, run.drawn)
    stop = None
    try:
        run.fit()
    except CalibrationError as error:
        stop = str(error)
    if stop is not None:  # it says where numbers leave float32, or the dtype of the scales
        assert change in ("huge", "an-outlier")
        assert re.match(r"block \d, .*(is not finite|model\.weights\.scale_dtype)", stop)
        return
    run.check()
    run.exported_logits()


def test_a_silent_model_has_no_error(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """The power of its outputs, which errors are compared with, is zero."""
    run = draw_run(random.Random(0), checkpoint("llama", 2, CHANGES["embeddings-off"]), tmp_path)
    run.fit()
    assert [(result.relative_error, result.relative_error_rtn) for result in run.keep.results] == [(0, 0)] * 2


TOKEN_IDS = {
    "one-sample": np.arange(2, 2 + TOKENS)[None],
    "two-tokens-a-window": np.arange(2, 14).reshape(6, 2),
    "one-token": np.full((6, TOKENS), 7),
    "equal-windows": np.tile(np.arange(2, 2 + TOKENS), (6, 1)),
}


@pytest.mark.parametrize("number", range(max(1, RUNS // SHORT)))
@pytest.mark.parametrize("tokens", TOKEN_IDS)
def test_degenerate_tokens(checkpoint: Callable[..., Path], tmp_path: Path, tokens: str, number: int) -> None:
    draws = random.Random(f"{tokens} {number}")
    name = draws.choice(list(VARIANTS))
    run = draw_run(draws, checkpoint(name, 2), tmp_path)
    run.calibration = TOKEN_IDS[tokens]
    run.drawn["data.samples"] = len(run.calibration)
    accept(run.drawn, VARIANTS[name].model_type)
    print(name, run.drawn)
    run.fit()
    run.check()
    run.check_logits()


def test_one_token_windows_are_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    run = draw_run(random.Random(0), checkpoint("llama", 2), tmp_path)
    run.calibration = run.calibration[:, :1]
    with pytest.raises(ConfigurationError, match=r"^data\.sequence_length: 1 .*too short"):
        run.fit()


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG.items() for value in values])
def test_wrong_values_are_refused(checkpoint: Callable[..., Path], tmp_path: Path, key: str, value: Any) -> None:
    run = draw_run(random.Random(0), checkpoint("llama", 2), tmp_path)
    run.drawn = spoil(run.drawn, key, value)
    with pytest.raises(ConfigurationError) as refused:
        run.fit()
    assert refused.value.key == key
    assert str(refused.value).startswith(f"{key}: ")
    assert not (tmp_path / "run").exists()
