"""Experts that no token, or not every batch, reaches."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from omniquant_pl.block import BlockModule
from omniquant_pl.callbacks import FoldCallback, NumericsGuard
from omniquant_pl.data import CalibrationData
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.quantized_block import QuantizedBlock
from omniquant_pl.run_folder import RunFolder
from omniquant_pl.spec import ClippingSpec, TransformSpec, WeightSpec
from omniquant_pl.trainer import SequentialTrainer

NEVER, SOMETIMES, EXPERTS, SAMPLES, VOCABULARY = 3, 2, 4, 4, 64
BITS = 3


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose routers never choose one expert, and another for the first half of the vocabulary only.

    Channel 0 of the residual stream is positive, channel 1 says which half a token is of; no block writes either.
    """
    config = MixtralConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=32,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = MixtralForCausalLM(config)
        embedding = model.model.embed_tokens.weight
        embedding[:, 0] = 2.0
        embedding[:, 1] = torch.where(torch.arange(VOCABULARY) < VOCABULARY // 2, 2.0, -2.0)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[:2] = 0
            layer.mlp.experts.down_proj[:, :2] = 0
            layer.mlp.gate.weight[NEVER] = 0
            layer.mlp.gate.weight[NEVER, 0] = -20.0
            layer.mlp.gate.weight[SOMETIMES] = 0
            layer.mlp.gate.weight[SOMETIMES, 1] = 20.0
    folder = tmp_path_factory.mktemp("mixtral")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    """Samples ``[samples, tokens]``; the first half of them is of the first half of the vocabulary."""
    ids = torch.randint(0, VOCABULARY // 2, (SAMPLES, 16), generator=torch.Generator().manual_seed(1))
    ids[SAMPLES // 2 :] += VOCABULARY // 2
    return ids


class Watch(Callback):
    """Records for every step of every block which experts have gradients, and what the step changed."""

    def __init__(self) -> None:
        self.steps: list[tuple[bool, set[int], set[int]]] = []
        """Whether the batch reaches the expert that some do; experts with gradients; experts that changed."""

    @staticmethod
    def _of_experts(module: BlockModule) -> dict[str, Any]:
        return {name: value for name, value in module.named_parameters() if "mlp/experts/" in name}

    @staticmethod
    def _expert(name: str) -> int:
        return int(name.partition("mlp/experts/")[2].partition("/")[0])

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.before = {name: value.detach().clone() for name, value in self._of_experts(pl_module).items()}

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        found = {name: value.grad for name, value in self._of_experts(pl_module).items() if value.grad is not None}
        assert all(bool(torch.isfinite(gradient).all()) for gradient in found.values())
        self.learning = {self._expert(name) for name in found}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        changed = {
            self._expert(name)
            for name, value in self._of_experts(pl_module).items()
            if not torch.equal(value, self.before[name])
        }
        self.steps.append((bool((batch[0][..., 1] > 0).any()), self.learning, changed))


class Keep(FoldCallback):
    def __init__(self) -> None:
        self.blocks: list[QuantizedBlock] = []

    def on_block_end(self, trainer: Any, block: QuantizedBlock, result: Any) -> None:
        self.blocks.append(block)


@pytest.fixture(scope="module")
def calibrate(mixtral: Path, tokens: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RunFolder]:
    root = tmp_path_factory.mktemp("runs")
    np.save(root / "tokens.npy", tokens.numpy())

    def calibrate(name: str, *callbacks: Callback, epochs: int = 2, **settings: Any) -> RunFolder:
        model = OmniQuantModel(
            str(mixtral),
            WeightSpec(BITS, 16),
            clipping=ClippingSpec(),
            transform=TransformSpec(mlp=True),
            weight_decay=0.5,
            **settings,
        )
        trainer = SequentialTrainer(
            max_epochs=epochs,
            callbacks=list(callbacks),
            default_root_dir=root / name,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        path = str(root / "tokens.npy")
        trainer.fit(model, datamodule=CalibrationData(dataset=path, samples=SAMPLES, evaluation=[path]))
        return trainer.run_folder

    return calibrate


def test_premise(mixtral: Path, tokens: Tensor) -> None:
    """What transformers' own routers choose."""
    model = AutoModelForCausalLM.from_pretrained(mixtral, dtype=torch.float32).eval()
    with torch.no_grad():
        routers = model(tokens, output_router_logits=True).router_logits
    for logits in routers:  # one block's, [samples * tokens, experts]
        chosen = logits.topk(2, dim=-1).indices.view(SAMPLES, -1)
        reached = [set(sample.tolist()) for sample in chosen]
        assert all(NEVER not in experts for experts in reached)
        assert [SOMETIMES in experts for experts in reached] == [True, True, False, False]
        assert set.union(*reached) == {0, 1, SOMETIMES}


class TestExperts:
    @pytest.fixture(scope="class")
    def watch(self) -> Watch:
        return Watch()

    @pytest.fixture(scope="class")
    def keep(self) -> Keep:
        return Keep()

    @pytest.fixture(scope="class")
    def messages(self, calibrate: Callable[..., RunFolder], watch: Watch, keep: Keep) -> list[str]:
        """Runs the calibration; what it has warned of."""
        records: list[logging.LogRecord] = []
        handler = logging.Handler()
        handler.emit = records.append  # type: ignore[method-assign]
        logger = logging.getLogger("omniquant_pl")
        logger.addHandler(handler)
        try:
            calibrate("run", keep, watch, NumericsGuard())
        finally:
            logger.removeHandler(handler)
        return [record.getMessage() for record in records if record.levelno >= logging.WARNING]

    def test_one_warning_a_block_names_those_that_no_token_reaches(self, messages: list[str]) -> None:
        assert len(messages) == 2
        for index, message in enumerate(messages):
            assert message.startswith(f"block {index}: no calibration token reached these experts: {NEVER}; ")
            assert "rounded to nearest in their full range" in message

    def test_a_batch_that_misses_an_expert_leaves_it_as_it_is(self, messages: list[str], watch: Watch) -> None:
        assert len(watch.steps) == 2 * 2 * SAMPLES
        for reaches, learning, changed in watch.steps:
            expected = {0, 1, SOMETIMES} if reaches else {0, 1}
            assert learning <= expected
            assert changed == learning
        assert {True, False} == {reaches for reaches, _, _ in watch.steps}
        assert all((SOMETIMES in learning) == reaches for reaches, learning, _ in watch.steps)

    def test_factors_of_unreached_experts_do_not_clip(self, messages: list[str], keep: Keep) -> None:
        for block in keep.blocks:
            for name, factor in block.factors.export().items():
                if name.startswith(f"mlp.experts.{NEVER}."):
                    assert bool(((torch.sigmoid(factor) if ".clip." in name else factor) == 1).all()), name
                elif ".clip." in name:
                    assert bool((torch.sigmoid(factor) < 1).all()), name

    @pytest.mark.parametrize("kind", ["w1", "w2", "w3"])
    def test_they_are_rounded_to_nearest(self, messages: list[str], keep: Keep, mixtral: Path, kind: str) -> None:
        """Their codes, in float64 from what transformers loads and the learned scale of the norm in front of them."""
        model = AutoModelForCausalLM.from_pretrained(mixtral, dtype=torch.float32)
        for block, layer in zip(keep.blocks, model.model.layers, strict=True):
            gate, up = layer.mlp.experts.gate_up_proj[NEVER].detach().chunk(2)
            weight = {"w1": gate, "w3": up, "w2": layer.mlp.experts.down_proj[NEVER].detach()}[kind]
            if kind != "w2":
                weight = weight * block.factors.export()["post_attention_layernorm.scale"]
            rows = weight.any(1)  # those that write the residual stream's channels 0 and 1 are empty
            assert int(rows.sum()) >= 24
            groups = [weight[rows, start : start + 16].double().numpy() for start in range(0, weight.shape[1], 16)]
            found = block.quantized[f"mlp.experts.{NEVER}.{kind}"]
            codes = [nearest_codes(group, found.scale[rows, i : i + 1].numpy()) for i, group in enumerate(groups)]
            assert np.array_equal(found.codes[rows].numpy(), np.concatenate(codes, axis=1))


def nearest_codes(rows: np.ndarray, stored_scale: np.ndarray) -> np.ndarray:
    """Asymmetric codes over the whole range of each row, whose scale must be the stored one in float16."""
    low, high = np.minimum(rows.min(1, keepdims=True), 0), np.maximum(rows.max(1, keepdims=True), 0)
    top = 2**BITS - 1
    assert np.allclose((high - low) / top, stored_scale, rtol=2**-11, atol=0)
    scale = stored_scale.astype(np.float64)
    return np.clip(np.round(rows / scale) + np.clip(np.round(-low / scale), 0, top), 0, top)


def test_factors_that_have_learned_before_are_kept(
    calibrate: Callable[..., RunFolder], caplog: pytest.LogCaptureFixture
) -> None:
    """Those of a run whose calibration set reached more experts, for example."""
    first = calibrate("first", FoldCallback(), epochs=0)
    for index in range(2):
        factors = first.load_factors(index)
        for name in factors:
            if name.startswith(f"mlp.experts.{NEVER}.") and ".clip." in name:
                factors[name] = torch.full_like(factors[name], 1.5)
        first.save_factors(index, factors)
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="omniquant_pl"):
        second = calibrate("second", FoldCallback(), parameters=str(first.path))
    assert not [record for record in caplog.records if "experts" in record.getMessage()]
    for index in range(2):
        learned, start = second.load_factors(index), first.load_factors(index)
        for name in learned:
            same = torch.equal(learned[name], start[name])
            assert same == name.startswith(f"mlp.experts.{NEVER}."), name
