"""The sequential trainer: epochs of every block, equality with a plain loop, what it refuses."""

from __future__ import annotations

import inspect
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from safetensors.torch import load_file
from torch import Tensor
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from omniquant_pl.blocks.module import BlockModule
from omniquant_pl.callbacks import ExportCallback, MetricsCallback
from omniquant_pl.errors import ConfigurationError
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.spec import LearningSpec, ObjectiveSpec, TransformSpec, WeightSpec
from omniquant_pl.trainer import SequentialTrainer
from omniquant_pl.trainer.checks import warn_of_slow_products

LINEARS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)


def test_a_tokenizer_that_token_ids_do_not_need(
    llama: Path, fit: Callable[..., SequentialTrainer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    fit(OmniQuantModel(str(folder)), max_epochs=0)
    assert "cannot be opened: tokenizer.json is a Git LFS pointer" in caplog.text
    (tmp_path / "a.txt").write_text("some text " * 100)
    with pytest.raises(ConfigurationError, match=r"data\.dataset: .*a\.txt' is text, and .*json is a Git LFS pointer"):
        fit(OmniQuantModel(str(folder)), data={"dataset": str(tmp_path / "a.txt")})


class Recorder(Callback):
    """Counts epochs and steps by block, and keeps every batch's inputs."""

    def __init__(self) -> None:
        self.epochs: dict[int, int] = {}
        self.batches: dict[tuple[int, int], list[Tensor]] = {}
        self.targets: set[int] = set()

    def on_train_epoch_start(self, trainer: Any, pl_module: BlockModule) -> None:
        self.epochs[pl_module.index] = self.epochs.get(pl_module.index, 0) + 1

    def on_train_batch_start(self, trainer: Any, pl_module: BlockModule, batch: Any, batch_idx: int) -> None:
        place = (pl_module.index, self.epochs[pl_module.index] - 1)
        self.batches.setdefault(place, []).append(batch[0].clone())
        self.targets.add(len(batch) - 1)

    def orders(self) -> list[list[int]]:
        """The order of the samples in every epoch, as positions in the first block's store."""
        return [
            [self.position(sample) for batch in batches for sample in batch]
            for (block, _), batches in sorted(self.batches.items())
            if block == 0
        ]

    def remember(self, samples: Tensor) -> None:
        self.samples = samples

    def position(self, sample: Tensor) -> int:
        return int((self.samples == sample).flatten(1).all(1).nonzero().item())


@pytest.fixture
def calibration_tokens(token_files: tuple[Path, Path]) -> Tensor:
    return torch.from_numpy(np.load(token_files[0]))


def factors_in(trainer: SequentialTrainer) -> list[dict[str, Tensor]]:
    return [load_file(path) for path in sorted(trainer.run_folder.blocks.iterdir())]


class TestEpochs:
    @pytest.mark.parametrize("epochs", [1, 2, 3])
    def test_every_block_gets_as_many(
        self, make_llama: Callable[..., Path], fit: Callable[..., SequentialTrainer], epochs: int
    ) -> None:
        recorder = Recorder()
        folder = make_llama(num_hidden_layers=3)
        fit(OmniQuantModel(str(folder)), [recorder], max_epochs=epochs)
        assert recorder.epochs == dict.fromkeys(range(3), epochs)
        assert [len(batches) for batches in recorder.batches.values()] == [6] * 3 * epochs

    def test_none_fold_the_initial_factors(
        self,
        make_llama: Callable[..., Path],
        fit: Callable[..., SequentialTrainer],
        calibration_tokens: Tensor,
    ) -> None:
        """Clipping starts at 4, the norms' scales from the activations as SmoothQuant has them."""
        folder, recorder = make_llama(num_key_value_heads=2), Recorder()
        model = OmniQuantModel(str(folder), transform=TransformSpec(alpha=0.75))
        trainer = fit(model, [recorder], max_epochs=0)
        assert recorder.epochs == {}
        reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        inputs: dict[str, Tensor] = {}
        for name, module in reference.named_modules():
            if name.endswith("_proj"):
                module.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
        with torch.no_grad():
            reference(calibration_tokens)
        for index, factors in enumerate(factors_in(trainer)):
            block = f"model.layers.{index}."
            readers = {
                "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
            }
            for norm, linears in readers.items():
                activation = inputs[block + linears[0]].abs().amax((0, 1))
                weights = [reference.get_parameter(f"{block}{n}.weight") for n in linears]
                weight = torch.cat([w.detach() for w in weights]).abs().amax(0)
                expected = activation**0.75 / weight**0.25
                torch.testing.assert_close(factors[f"{norm}.scale"], expected)
            clips = [factor for name, factor in factors.items() if ".clip." in name]
            assert len(clips) == 2 * len(LINEARS)
            assert all(bool((clip == 4.0).all()) for clip in clips)

    def test_nothing_to_learn_is_round_to_nearest(self, llama: Path, fit: Callable[..., SequentialTrainer]) -> None:
        model = OmniQuantModel(str(llama), WeightSpec(bits=3), clipping=None)
        trainer = fit(model, [MetricsCallback()], max_epochs=2)
        measured = trainer.run_folder.read_metrics()["perplexity"]["evaluation"]
        assert measured["quantized"] == measured["round_to_nearest"]
        assert measured["quantized"] != measured["full_precision"]

    def test_a_block_that_stops_early_does_not_end_the_calibration(
        self, make_llama: Callable[..., Path], fit: Callable[..., SequentialTrainer]
    ) -> None:
        stop, recorder = EarlyStopping("loss", patience=1, min_delta=1e9), Recorder()
        folder = make_llama(num_hidden_layers=3)
        fit(OmniQuantModel(str(folder)), [stop, recorder], max_epochs=5)
        assert set(recorder.epochs) == {0, 1, 2}
        assert recorder.epochs[0] == 2

    def test_every_block_stops_early_by_itself(self, llama: Path, fit: Callable[..., SequentialTrainer]) -> None:
        stop, recorder = EarlyStopping("loss", patience=1, min_delta=1e9), Recorder()
        fit(OmniQuantModel(str(llama)), [stop, recorder], max_epochs=5)
        assert recorder.epochs == {0: 2, 1: 2}

    def test_the_least_epochs_are_those_of_every_block(
        self, llama: Path, fit: Callable[..., SequentialTrainer]
    ) -> None:
        stop, recorder = EarlyStopping("loss", patience=1, min_delta=1e9), Recorder()
        fit(OmniQuantModel(str(llama)), [stop, recorder], max_epochs=5, min_epochs=4)
        assert recorder.epochs == {0: 4, 1: 4}


class PlainLoop:
    """OmniQuant's weight-only calibration as a plain PyTorch loop, written out anew.

    Rounding passes its gradient straight through; everything else is left to autograd.
    """

    def __init__(self, folder: Path, bits: int, group_size: int) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model.requires_grad_(False)
        self.bits, self.group_size = bits, group_size

    def fake_quantize(
        self, weight: Tensor, upper: Tensor, lower: Tensor, storage: torch.dtype = torch.float32
    ) -> Tensor:
        top = 2**self.bits - 1
        groups = weight.reshape(len(weight), -1, self.group_size)
        high = groups.amax(-1).clamp(min=0) * torch.sigmoid(upper)
        low = groups.amin(-1).clamp(max=0) * torch.sigmoid(lower)
        scale = ((high - low) / top).to(storage).float()
        zero = self.round(-low / scale).clamp(0, top)[..., None]
        codes = (self.round(groups / scale[..., None]) + zero).clamp(0, top)
        return ((codes - zero) * scale[..., None]).view_as(weight)

    @staticmethod
    def round(value: Tensor) -> Tensor:
        return value + (value.round() - value).detach()

    def run(self, tokens: Tensor, epochs: int, batch_size: int, aug_loss: bool) -> list[Any]:
        """Returns the learned factors of every block."""
        learned = []
        inner = self.model.model
        full = quantized = inner.embed_tokens(tokens)
        positions = torch.arange(tokens.shape[1])[None]
        options = {"position_embeddings": inner.rotary_emb(full, positions)}
        mask = torch.full((tokens.shape[1],) * 2, -torch.inf).triu(1)[None, None]
        options["attention_mask"] = mask
        for block in inner.layers:
            target = block(full, **options)
            targets = [target, block(quantized, **options)] if aug_loss else [target]
            factors = self.learn(block, quantized, targets, options, epochs, batch_size)
            learned.append({name: factor.detach() for name, factor in factors.items()})
            with torch.no_grad():
                weights = self.weights(block, factors, torch.float16)
                quantized = functional_call(block, weights, (quantized,), options)
            full = target
        return learned

    def weights(self, block: Any, factors: dict[str, Tensor], storage: torch.dtype) -> Any:
        return {
            f"{name}.weight": self.fake_quantize(
                block.get_parameter(f"{name}.weight"),
                factors[f"{name}.clip.upper"],
                factors[f"{name}.clip.lower"],
                storage,
            )
            for name in LINEARS
        }

    def learn(
        self, block: Any, inputs: Tensor, targets: list[Tensor], options: Any, epochs: int, size: int
    ) -> dict[str, Tensor]:
        factors = {}
        for name in LINEARS:
            out, columns = block.get_parameter(f"{name}.weight").shape
            for end in ("upper", "lower"):
                start = torch.full((out, columns // self.group_size), 4.0)
                factors[f"{name}.clip.{end}"] = start.requires_grad_()
        optimizer = torch.optim.AdamW(factors.values(), lr=1e-2, weight_decay=0)
        for _ in range(epochs):
            for start in range(0, len(inputs), size):
                batch = slice(start, start + size)
                weights = self.weights(block, factors, torch.float32)
                output = functional_call(block, weights, (inputs[batch],), options)
                loss = sum((output - target[batch]).square().mean() for target in targets)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return factors


@pytest.mark.parametrize(("batch_size", "aug_loss"), [(1, False), (4, False), (4, True)], ids=["1", "4+2", "aug"])
def test_equals_a_plain_loop(
    make_llama: Callable[..., Path],
    fit: Callable[..., SequentialTrainer],
    calibration_tokens: Tensor,
    batch_size: int,
    aug_loss: bool,
) -> None:
    """Both streams, both losses, the shorter last batch, the optimizer: all of it at once."""
    folder, recorder = make_llama(num_key_value_heads=2), Recorder()
    model = OmniQuantModel(str(folder), WeightSpec(bits=3, group_size=16), objective=ObjectiveSpec(aug_loss))
    trainer = fit(model, [recorder], {"batch_size": batch_size}, max_epochs=2)
    plain = PlainLoop(folder, bits=3, group_size=16)
    expected = plain.run(calibration_tokens, 2, batch_size, aug_loss)
    sizes = [1] * 6 if batch_size == 1 else [4, 2]
    assert [len(batch) for batch in recorder.batches[0, 0]] == sizes
    assert recorder.targets == {2 if aug_loss else 1}
    for factors, wanted in zip(factors_in(trainer), expected, strict=True):
        assert set(factors) == set(wanted)
        errors = torch.cat([(factors[name] - wanted[name]).abs().flatten() for name in wanted])
        # Where a gradient is all rounding error, Adam's first step may go either way.
        assert errors.quantile(0.98) < 1e-4
        moved = torch.cat([(wanted[name] - 4.0).abs().flatten() for name in wanted])
        assert moved.median() > 5e-3


def test_mixed_precision_keeps_the_factors_in_float32(
    llama: Path, fit: Callable[..., SequentialTrainer], tmp_path: Path
) -> None:
    half, full = (
        factors_in(fit(OmniQuantModel(str(llama)), precision=name, default_root_dir=tmp_path / name))
        for name in ("bf16-mixed", "32-true")
    )
    for factors, exact in zip(half, full, strict=True):
        assert {factor.dtype for factor in factors.values()} == {torch.float32}
        moved = torch.cat([(exact[name] - 4.0).flatten() for name in exact])
        moved_in_half = torch.cat([(factors[name] - 4.0).flatten() for name in exact])
        assert not torch.equal(moved, moved_in_half)
        assert torch.nn.functional.cosine_similarity(moved, moved_in_half, dim=0) > 0.9


class TestReproducible:
    @staticmethod
    def content(root: Path) -> dict[str, bytes]:
        names = [*root.glob("blocks/*"), *root.glob("model/*")]
        return {str(path.relative_to(root)): path.read_bytes() for path in names}

    def test_same_seed_same_bytes(self, llama: Path, fit: Callable[..., SequentialTrainer], tmp_path: Path) -> None:
        for name in ("a", "b"):
            model = OmniQuantModel(str(llama), transform=TransformSpec())
            callbacks = [ExportCallback(shard_bytes=20_000), MetricsCallback()]
            fit(model, callbacks, {"shuffle": True}, default_root_dir=tmp_path / name)
        first, second = self.content(tmp_path / "a"), self.content(tmp_path / "b")
        assert {"blocks/00001.safetensors", "model/README.md"} <= set(first)
        assert first == second

    def test_order_is_a_function_of_seed_and_epoch(
        self,
        llama: Path,
        fit: Callable[..., SequentialTrainer],
        calibration_tokens: Tensor,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
    ) -> None:
        def orders(seed: int, shuffle: bool = True, noise: int = 0) -> list[list[int]]:
            monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
            torch.manual_seed(noise)
            recorder, model = Recorder(), OmniQuantModel(str(llama))
            recorder.remember(model.source.embed(calibration_tokens))
            fit(model, [recorder], {"shuffle": shuffle}, max_epochs=3)
            return recorder.orders()

        shuffled = orders(2)
        assert all(sorted(order) == list(range(6)) for order in shuffled)
        assert len({tuple(order) for order in shuffled}) == 3
        assert orders(2, noise=5) == shuffled
        assert orders(3) != shuffled
        assert orders(2, shuffle=False) == [list(range(6))] * 3


class TestRefused:
    """Settings that cannot work, by the key that a configuration has."""

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("precision", "16-mixed"),
            ("precision", "16-true"),
            ("precision", "bf16-true"),
            ("precision", 16),
            ("precision", 64),
            ("max_steps", 5),
            ("min_steps", 5),
            ("max_epochs", -1),
            ("max_epochs", -2),
            ("strategy", "fsdp"),
            ("strategy", "ddp_spawn"),
        ],
    )
    def test_by_their_key(self, tmp_path: Path, key: str, value: object) -> None:
        options = {"accelerator": "cpu", "logger": False, key: value}
        with pytest.raises(ConfigurationError) as caught:
            SequentialTrainer(default_root_dir=tmp_path / "run", **options)  # type: ignore[arg-type]
        assert str(caught.value).startswith(f"trainer.{key}: ")
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize("precision", [None, 32, "32", "32-true", "bf16", "bf16-mixed"])
    def test_precisions_that_work(self, tmp_path: Path, precision: Any) -> None:
        SequentialTrainer(default_root_dir=tmp_path, accelerator="cpu", precision=precision)

    def test_several_processes_with_one_device_each(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(ConfigurationError, match=r"^trainer\."):
            SequentialTrainer(default_root_dir=tmp_path, accelerator="cpu")

    def test_file_in_the_place_of_the_run_folder(self, tmp_path: Path) -> None:
        (tmp_path / "run").write_text("")
        with pytest.raises(ConfigurationError, match=r"^trainer\.default_root_dir: .*run"):
            SequentialTrainer(default_root_dir=tmp_path / "run", accelerator="cpu")

    @pytest.mark.parametrize(
        "options",
        [{"accelerator": "abacus"}, {"strategy": "luck"}, {"gradient_clip_algorithm": "scissors"}],
        ids=lambda options: next(iter(options)),
    )
    def test_what_lightning_refuses(self, tmp_path: Path, options: dict[str, Any]) -> None:
        with pytest.raises(ConfigurationError, match=rf"^trainer\.{next(iter(options))}: ."):
            SequentialTrainer(**({"default_root_dir": tmp_path, "accelerator": "cpu"} | options))


class TestPrivateNames:
    """What the trainer takes from Lightning's inside; when these fail, read trainer/sequential.py again."""

    def test_release(self) -> None:
        assert lightning.__version__.startswith("2.6.")

    def test_fit_calls_what_is_overridden(self) -> None:
        own, theirs = (inspect.signature(cls._fit_impl).parameters for cls in (SequentialTrainer, Trainer))
        assert list(own) == list(theirs)
        assert "self._fit_impl" in inspect.getsource(Trainer.fit)

    def test_what_is_called(self) -> None:
        run = inspect.signature(Trainer._run).parameters
        assert list(run)[:2] == ["self", "model"]
        assert all(p.default is not p.empty for p in list(run.values())[2:])
        trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        attach = inspect.signature(trainer._data_connector.attach_data).parameters
        assert {"model", "train_dataloaders"} <= set(attach)

    def test_epochs_are_counted_over_the_life_of_a_trainer(self) -> None:
        trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        assert trainer.fit_loop.epoch_progress.current.processed == 0
        trainer.fit_loop.max_epochs = 7
        assert trainer.max_epochs == 7


@pytest.mark.parametrize(
    ("precision", "device", "vectors", "warns"),
    [
        ("bf16-mixed", "cpu", "AVX2", True),
        ("bf16-mixed", "cpu", "DEFAULT", True),
        ("bf16-mixed", "cpu", "AVX512", False),
        ("32-true", "cpu", "AVX2", False),
        ("bf16-mixed", "cuda", "AVX2", False),
    ],
)
def test_slow_products_are_said(
    precision: str,
    device: str,
    vectors: str,
    warns: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: vectors)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    warn_of_slow_products(precision, torch.device(device))
    assert bool(caplog.records) is warns


def test_compiled_steps_learn_the_same(fit: Callable[..., SequentialTrainer], llama: Path, tmp_path: Path) -> None:
    for name, compiles in (("plain", False), ("compiled", True)):
        fit(
            OmniQuantModel(str(llama), WeightSpec(3), learning=LearningSpec(compile=compiles)),
            [],
            default_root_dir=tmp_path / name,
            max_epochs=2,
        )
    for path in sorted((tmp_path / "plain" / "blocks").iterdir()):
        plain, compiled = load_file(path), load_file(tmp_path / "compiled" / "blocks" / path.name)
        assert all((factor - compiled[name]).norm() < 1e-2 * factor.norm() for name, factor in plain.items())
