"""Windows of blocks, the loss of the last one, and experts that no token, or not every batch, reaches."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch.distributions import Categorical, kl_divergence
from torch.func import functional_call
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from kept_blocks import KeepBlocks
from omniquant_pl.blocks.module import BlockModule
from omniquant_pl.blocks.quantized_block import QuantizedBlock
from omniquant_pl.calibration.hooks import BlockResult, CalibrationCallback
from omniquant_pl.callbacks import FoldCallback, MetricsCallback, NumericsGuard
from omniquant_pl.data import CalibrationData
from omniquant_pl.errors import ConfigurationError
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.run.folder import RunFolder
from omniquant_pl.spec import (
    ClippingSpec,
    LearningSpec,
    ObjectiveSpec,
    RoundingSpec,
    TransformSpec,
    WeightSpec,
    WindowSpec,
)
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
def halves() -> Tensor:
    """Samples ``[samples, tokens]``; the first half of them is of the first half of the vocabulary."""
    ids = torch.randint(0, VOCABULARY // 2, (SAMPLES, 16), generator=torch.Generator().manual_seed(1))
    ids[SAMPLES // 2 :] += VOCABULARY // 2
    return ids


class HeartbeatMonitor(Callback):
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


@pytest.fixture(scope="module")
def calibrate(mixtral: Path, halves: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RunFolder]:
    root = tmp_path_factory.mktemp("runs")
    np.save(root / "tokens.npy", halves.numpy())

    def calibrate(
        name: str, *callbacks: Callback, epochs: int = 2, compiles: bool = False, **settings: Any
    ) -> RunFolder:
        model = OmniQuantModel(
            str(mixtral),
            WeightSpec(BITS, 16),
            clipping=ClippingSpec(),
            transform=TransformSpec(mlp=True),
            learning=LearningSpec(weight_decay=0.5, compile=compiles),
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


def test_premise(mixtral: Path, halves: Tensor) -> None:
    """What transformers' own routers choose."""
    model = AutoModelForCausalLM.from_pretrained(mixtral, dtype=torch.float32).eval()
    with torch.no_grad():
        routers = model(halves, output_router_logits=True).router_logits
    for logits in routers:  # one block's, [samples * tokens, experts]
        chosen = logits.topk(2, dim=-1).indices.view(SAMPLES, -1)
        reached = [set(sample.tolist()) for sample in chosen]
        assert all(NEVER not in experts for experts in reached)
        assert [SOMETIMES in experts for experts in reached] == [True, True, False, False]
        assert set.union(*reached) == {0, 1, SOMETIMES}


class TestExperts:
    @pytest.fixture(scope="class")
    def watch(self) -> HeartbeatMonitor:
        return HeartbeatMonitor()

    @pytest.fixture(scope="class")
    def keep(self) -> KeepBlocks:
        return KeepBlocks()

    @pytest.fixture(scope="class")
    def messages(self, calibrate: Callable[..., RunFolder], watch: HeartbeatMonitor, keep: KeepBlocks) -> list[str]:
        """Runs the calibration; what it has warned of."""
        records: list[logging.LogRecord] = []
        handler = logging.Handler()
        handler.emit = records.append  # type: ignore[method-assign]
        logger = logging.getLogger("omniquant_pl")
        logger.addHandler(handler)
        try:
            calibrate("run", FoldCallback(), keep, watch, NumericsGuard())
        finally:
            logger.removeHandler(handler)
        return [record.getMessage() for record in records if record.levelno >= logging.WARNING]

    def test_one_warning_a_block_names_those_that_no_token_reaches(self, messages: list[str]) -> None:
        assert len(messages) == 2
        for index, message in enumerate(messages):
            assert message.startswith(f"block {index}: no calibration token reached these experts: {NEVER}; ")
            assert "rounded to nearest in their full range" in message

    def test_a_batch_that_misses_an_expert_leaves_it_as_it_is(
        self, messages: list[str], watch: HeartbeatMonitor
    ) -> None:
        assert len(watch.steps) == 2 * 2 * SAMPLES
        for reaches, learning, changed in watch.steps:
            expected = {0, 1, SOMETIMES} if reaches else {0, 1}
            assert learning <= expected
            assert changed == learning
        assert {True, False} == {reaches for reaches, _, _ in watch.steps}
        assert all((SOMETIMES in learning) == reaches for reaches, learning, _ in watch.steps)

    def test_factors_of_unreached_experts_do_not_clip(self, messages: list[str], keep: KeepBlocks) -> None:
        for block in keep.blocks:
            for name, factor in block.factors.export().items():
                if name.startswith(f"mlp.experts.{NEVER}."):
                    assert bool(((torch.sigmoid(factor) if ".clip." in name else factor) == 1).all()), name
                elif ".clip." in name:
                    assert bool((torch.sigmoid(factor) < 1).all()), name

    @pytest.mark.parametrize("kind", ["w1", "w2", "w3"])
    def test_they_are_rounded_to_nearest(self, messages: list[str], keep: KeepBlocks, mixtral: Path, kind: str) -> None:
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


GROUP, LR = 16, 1e-2


@dataclass
class Window:
    """What one fit of a window starts from, sees and ends with."""

    blocks: list[int]
    start: dict[int, dict[str, Tensor]]
    """Factors by block."""
    end: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    batches: list[tuple[Tensor, ...]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


class Windows(CalibrationCallback):
    """Records windows as they learn, and blocks as they are prepared and folded."""

    def __init__(self) -> None:
        self.windows: list[Window] = []
        self.events: list[tuple[str, int]] = []
        self.results: list[BlockResult] = []
        self.folded: dict[int, dict[str, Tensor]] = {}

    @staticmethod
    def factors(module: Any) -> dict[int, dict[str, Tensor]]:
        return {
            block.index: {name: factor.clone() for name, factor in block.factors.export().items()}
            for block in module.blocks
        }

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        start = self.factors(pl_module)
        self.windows.append(Window(list(start), start))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.windows[-1].batches.append(tuple(part.clone() for part in batch))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.windows[-1].losses.append(float(outputs["loss"]))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.windows[-1].end = self.factors(pl_module)

    def on_block_start(self, trainer: Any, block: QuantizedBlock) -> None:
        self.events.append(("start", block.index))

    def on_block_trained(self, trainer: Any, block: QuantizedBlock) -> None:
        self.events.append(("folded", block.index))

    def on_block_end(self, trainer: Any, block: QuantizedBlock, result: BlockResult) -> None:
        self.folded[block.index] = {name: tensor.clone() for name, tensor in block.tensors.items()}
        self.results.append(result)


class Reference:
    """The model as transformers runs it, with some of its blocks' tensors replaced."""

    def __init__(self, folder: Path, tokens: Tensor) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.model.requires_grad_(False)
        self.tokens = tokens

    def hidden(self, replaced: Mapping[int, Mapping[str, Tensor]]) -> list[Tensor]:
        """The embedding and the output of every block, ``[samples, tokens, channels]`` each."""
        model, states = copy.deepcopy(self.model), []
        for index, tensors in replaced.items():
            model.model.layers[index].load_state_dict(tensors)
        model.model.layers[0].register_forward_pre_hook(lambda _, args: states.append(args[0]))
        for layer in model.model.layers:
            layer.register_forward_hook(lambda _, args, output: states.append(output))
        with torch.no_grad():
            model(self.tokens)
        return states

    def options(self) -> dict[str, Any]:
        """What the model hands to its blocks beside the hidden states."""
        found: dict[str, Any] = {}
        handle = self.model.model.layers[0].register_forward_pre_hook(
            lambda _, args, options: found.update(options), with_kwargs=True
        )
        self.model(self.tokens[:1], use_cache=False)
        handle.remove()
        return found

    def weights(self, index: int, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The fake-quantized weights of a block; roundings pass their gradients, autograd does the rest."""
        found = {}
        for name in {name.rpartition(".clip.")[0] for name in factors}:
            weight = self.model.model.layers[index].get_parameter(f"{name}.weight")
            groups = weight.reshape(len(weight), -1, GROUP)
            high = groups.amax(-1).clamp(min=0) * torch.sigmoid(factors[f"{name}.clip.upper"])
            low = groups.amin(-1).clamp(max=0) * torch.sigmoid(factors[f"{name}.clip.lower"])
            scale = ((high - low) / (2**BITS - 1))[..., None]
            zero = self.round(-low[..., None] / scale)
            codes = (self.round(groups / scale) + zero).clamp(0, 2**BITS - 1)
            found[f"{name}.weight"] = ((codes - zero) * scale).view_as(weight)
        return found

    @staticmethod
    def round(value: Tensor) -> Tensor:
        return value + (value.round() - value).detach()

    def logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.model.lm_head(self.model.model.norm(hidden))
        return logits

    def learn(self, window: Window, diverges: bool) -> tuple[dict[int, dict[str, Tensor]], list[float]]:
        """A plain loop over the window's batches, from where it started: its factors, and the loss of every step."""
        factors = {
            index: {name: factor.clone().requires_grad_() for name, factor in start.items()}
            for index, start in window.start.items()
        }
        optimizer = torch.optim.AdamW([f for found in factors.values() for f in found.values()], lr=LR, weight_decay=0)
        losses, options = [], self.options()
        for hidden, *targets in window.batches:
            for index, found in factors.items():
                layer = self.model.model.layers[index]
                hidden = functional_call(layer, self.weights(index, found), (hidden,), options)
            loss = torch.zeros(())
            for target in targets:
                if diverges:
                    expected, predicted = (Categorical(logits=self.logits(h)) for h in (target, hidden))
                    loss = loss + kl_divergence(expected, predicted).mean()
                else:
                    loss = loss + (hidden - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return factors, losses


class TestWindows:
    @pytest.fixture
    def samples(self, token_files: tuple[Path, Path]) -> Tensor:
        return torch.from_numpy(np.load(token_files[0]))

    @pytest.mark.parametrize(
        ("layers", "window", "expected"),
        [
            (3, WindowSpec(), [[0], [1], [2]]),
            (4, WindowSpec(2, 1), [[0, 1], [1, 2], [2, 3]]),
            (5, WindowSpec(2, 2), [[0, 1], [2, 3], [4]]),
            (5, WindowSpec(3, 2), [[0, 1, 2], [2, 3, 4]]),
            (4, WindowSpec(3, 2), [[0, 1, 2], [2, 3]]),
            (2, WindowSpec(5, 1), [[0, 1]]),
            (2, WindowSpec(5, 4), [[0, 1]]),
        ],
    )
    def test_every_block_is_folded_once_and_in_order(
        self,
        make_llama: Callable[..., Path],
        fit: Callable[..., SequentialTrainer],
        layers: int,
        window: WindowSpec,
        expected: list[list[int]],
    ) -> None:
        record, folder = Windows(), make_llama(num_hidden_layers=layers)
        trainer = fit(
            OmniQuantModel(str(folder), objective=ObjectiveSpec(window=window)),
            [record, MetricsCallback()],
            {"samples": 1},
            max_epochs=2,
        )
        assert [found.blocks for found in record.windows] == expected
        for event in ("start", "folded"):
            assert [index for name, index in record.events if name == event] == list(range(layers))
        for index in range(layers):
            learned = [blocks for blocks in expected if index in blocks]
            assert trainer.run_folder.read_metrics()["blocks"][index]["index"] == index
            assert trainer.run_folder.read_metrics()["blocks"][index]["epochs"] == 2 * len(learned)
        for number, found in enumerate(record.windows):
            assert len(found.losses) == 2
            for index in found.blocks:
                assert any(
                    not torch.equal(found.start[index][name], found.end[index][name]) for name in found.end[index]
                )
                earlier = [w for w in record.windows[:number] if index in w.blocks]
                if earlier:  # it goes on from where it was
                    torch.testing.assert_close(found.start[index], earlier[-1].end[index], rtol=0, atol=0)
                last = all(index not in w.blocks for w in record.windows[number + 1 :])
                if last:
                    stored = trainer.run_folder.load_factors(index)
                    torch.testing.assert_close(stored, found.end[index], rtol=0, atol=0)

    @pytest.mark.parametrize("aug_loss", [False, True])
    @pytest.mark.parametrize("window", [WindowSpec(2, 1), WindowSpec(2, 2), WindowSpec(9, 1)], ids=str)
    def test_streams_and_targets_are_those_of_transformers(
        self,
        make_llama: Callable[..., Path],
        fit: Callable[..., SequentialTrainer],
        samples: Tensor,
        window: WindowSpec,
        aug_loss: bool,
    ) -> None:
        record, folder = Windows(), make_llama(num_hidden_layers=4, num_key_value_heads=2)
        fit(
            OmniQuantModel(str(folder), WeightSpec(2, GROUP), objective=ObjectiveSpec(aug_loss, window=window)),
            [record],
        )
        reference = Reference(folder, samples)
        full = reference.hidden({})
        for found in record.windows:
            first, last = found.blocks[0], found.blocks[-1]
            quantized = reference.hidden({index: record.folded[index] for index in range(first)})
            expected = [quantized[first], full[last + 1], *([quantized[last + 1]] if aug_loss else [])]
            streams = [torch.cat(parts) for parts in zip(*found.batches, strict=True)]
            torch.testing.assert_close(streams, expected, rtol=1e-4, atol=1e-4)
            assert first == 0 or (quantized[first] - full[first]).abs().max() > 0.1
        behind = reference.hidden(record.folded)
        for result in record.results:
            place = result.index + 1
            error = float((behind[place] - full[place]).square().mean())
            assert result.loss_final == pytest.approx(error, rel=1e-4)
            assert result.relative_error == pytest.approx(error / float(full[place].square().mean()), rel=1e-4)

    @pytest.mark.parametrize("output_loss", ["mse", "kl"])
    @pytest.mark.parametrize(
        ("window", "aug_loss"),
        [(WindowSpec(), False), (WindowSpec(2, 1), False), (WindowSpec(2, 1), True), (WindowSpec(2, 2), False)],
        ids=["1", "2", "2-aug", "2-stride-2"],
    )
    def test_windows_learn_as_in_a_plain_loop(
        self,
        make_llama: Callable[..., Path],
        fit: Callable[..., SequentialTrainer],
        samples: Tensor,
        window: WindowSpec,
        aug_loss: bool,
        output_loss: Any,
    ) -> None:
        """The error behind the last block of a window, or for the model's last block the divergence of predictions."""
        record, folder = Windows(), make_llama(num_hidden_layers=3, num_key_value_heads=2)
        model = OmniQuantModel(
            str(folder), WeightSpec(BITS, GROUP), objective=ObjectiveSpec(aug_loss, output_loss, window)
        )
        fit(model, [record], max_epochs=2)
        reference = Reference(folder, samples)
        for found in record.windows:
            assert len(found.batches) == 12
            factors, losses = reference.learn(found, output_loss == "kl" and 2 in found.blocks)
            assert found.losses[0] == pytest.approx(losses[0], rel=1e-4)
            assert found.losses == pytest.approx(losses, rel=1e-2)
            names = [(index, name) for index in found.blocks for name in factors[index]]
            assert all(set(factors[index]) == set(found.end[index]) for index in found.blocks)
            errors = torch.cat([(factors[i][name] - found.end[i][name]).abs().flatten() for i, name in names])
            moved = torch.cat([(factors[i][name] - found.start[i][name]).abs().flatten() for i, name in names])
            # Where a gradient is all rounding error, Adam's first step may go either way.
            assert errors.quantile(0.97) < 1e-4
            assert moved.median() > 5e-3

    def test_initial_losses_are_those_of_the_first_factors(
        self, make_llama: Callable[..., Path], fit: Callable[..., SequentialTrainer], samples: Tensor
    ) -> None:
        """A block that enters a window is measured behind those in front of it, as far as they have learned."""
        record, folder = Windows(), make_llama(num_hidden_layers=4)
        fit(
            OmniQuantModel(str(folder), WeightSpec(BITS, GROUP), objective=ObjectiveSpec(window=WindowSpec(3, 1))),
            [record],
        )
        reference = Reference(folder, samples)
        full = reference.hidden({})
        for index, result in enumerate(record.results):
            entered = next(found for found in record.windows if index in found.blocks)
            replaced = {i: record.folded[i] for i in range(entered.blocks[0])}
            for i in entered.blocks:
                original = reference.model.model.layers[i].state_dict()
                replaced[i] = {**original, **reference.weights(i, entered.start[i])}
            found = reference.hidden(replaced)[index + 1]
            assert result.loss_initial == pytest.approx(float((found - full[index + 1]).square().mean()), rel=1e-3)

    @pytest.mark.parametrize("window", [WindowSpec(1, 1), WindowSpec(3, 1), WindowSpec(3, 3)], ids=str)
    def test_on_one_block_all_windows_are_the_same(
        self, make_llama: Callable[..., Path], fit: Callable[..., SequentialTrainer], tmp_path: Path, window: WindowSpec
    ) -> None:
        folder, learned = str(make_llama(num_hidden_layers=1)), []
        for name, settings in {"plain": WindowSpec(), "window": window}.items():
            model = OmniQuantModel(folder, transform=TransformSpec(), objective=ObjectiveSpec(True, window=settings))
            learned.append(fit(model, default_root_dir=tmp_path / name).run_folder.load_factors(0))
        torch.testing.assert_close(*learned, rtol=0, atol=0)
        assert bool((learned[0]["mlp.up_proj.clip.upper"] != 4).any())

    def test_windows_of_one_are_the_blocks_one_by_one(
        self, llama: Path, fit: Callable[..., SequentialTrainer], tmp_path: Path
    ) -> None:
        """The first block does not see the second; in a window it does."""
        runs = {
            "plain": {},
            "one": {"objective": ObjectiveSpec(window=WindowSpec(1, 1))},
            "two": {"objective": ObjectiveSpec(window=WindowSpec(2, 1))},
        }
        plain, one, two = (
            fit(OmniQuantModel(str(llama), **settings), default_root_dir=tmp_path / name).run_folder
            for name, settings in runs.items()
        )
        for index in range(2):
            torch.testing.assert_close(plain.load_factors(index), one.load_factors(index), rtol=0, atol=0)
        assert plain.factor_file(1).read_bytes() == one.factor_file(1).read_bytes()
        name = "mlp.down_proj.clip.upper"
        assert not torch.equal(plain.load_factors(0)[name], two.load_factors(0)[name])


@pytest.mark.parametrize(
    "settings",
    [{"rounding": RoundingSpec("gptq")}, {"objective": ObjectiveSpec(window=WindowSpec(2, 1))}],
    ids=["gptq", "window"],
)
def test_blocks_come_back_to_the_device_after_a_fit(
    make_llama: Callable[..., Path],
    fit: Callable[..., SequentialTrainer],
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
) -> None:
    """Lightning moves a module to the CPU when its fit ends; here such blocks refuse to run until they are moved."""
    away: set[int] = set()
    left, moved, run = BlockModule.cpu, torch.nn.Module.to, QuantizedBlock.forward

    def leave(module: Any) -> Any:
        away.update(id(block) for block in module.blocks)
        return left(module)

    def move(module: Any, *arguments: Any, **options: Any) -> Any:
        away.difference_update(id(child) for child in module.modules())
        return moved(module, *arguments, **options)

    def forward(block: QuantizedBlock, hidden: Tensor) -> Tensor:
        assert id(block) not in away, f"block {block.index} is on the CPU, its input on the device"
        return run(block, hidden)

    monkeypatch.setattr(BlockModule, "cpu", leave)
    monkeypatch.setattr(torch.nn.Module, "to", move)
    monkeypatch.setattr(QuantizedBlock, "forward", forward)
    ended: list[int] = []

    class Ended(CalibrationCallback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            ended.append(pl_module.index)

    fit(OmniQuantModel(str(make_llama(num_hidden_layers=3)), **settings), [Ended()], {"samples": 1}, max_epochs=1)
    assert ended  # there were fits to end


def test_mixtures_are_not_compiled(calibrate: Callable[..., RunFolder]) -> None:
    with pytest.raises(ConfigurationError, match=r"^model\.learning\.compile: experts get another number of tokens"):
        calibrate("compiled", FoldCallback(), compiles=True)
