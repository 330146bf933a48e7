"""A Lightning trainer that fits one block after the other.

Everything here that leans on Lightning's private names is in :meth:`SequentialTrainer._fit_impl` and
:meth:`SequentialTrainer._fit_block`; ``lightning`` is pinned to the minor release they were read in.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.trainer.states import TrainerStatus
from rich.console import Console
from torch import Tensor
from typing_extensions import override

from omniquant_pl.activations import BatchOrder, Storage, StreamBatches, place_for
from omniquant_pl.block import BlockModule
from omniquant_pl.calibration import Calibration, Engine
from omniquant_pl.checkpoint.guarded import GuardedCheckpointIO, load_latest
from omniquant_pl.data import CalibrationData, TextSettings
from omniquant_pl.errors import ConfigurationError
from omniquant_pl.evaluate import VARIANTS, Evaluation, perplexity_table
from omniquant_pl.export import (
    FormatName,
    StorageDtype,
    Verification,
    open_format,
    open_runnable,
    refuse_differing,
    verification_table,
)
from omniquant_pl.fingerprint import fingerprint
from omniquant_pl.finished import FinishedBlocks
from omniquant_pl.hooks import CalibrationCallback
from omniquant_pl.interruption import Interruption, is_requeued
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.run_folder import RunFolder
from omniquant_pl.runtime import (
    Generation,
    Sampling,
    generate,
    generation_table,
    memory_line,
    usable_device,
    write_terminal,
)

__all__ = ["SequentialTrainer"]

_PRECISIONS = ("32-true", "bf16-mixed")


class SequentialTrainer(Trainer):
    """Calibrates the blocks of a model in order; ``max_epochs`` counts the epochs of one block.

    Args:
        logger: Loggers of the loss; ``None`` or true writes ``logs/metrics.csv`` in the run folder.
        max_epochs: Epochs per block; 0 folds the initial factors.
        options: As :class:`lightning.pytorch.Trainer`.

    Raises:
        ConfigurationError: If a setting cannot work; it names the setting.
    """

    def __init__(
        self,
        *,
        logger: Logger | list[Logger] | bool | None = None,
        max_epochs: int = 20,
        **options: Any,
    ) -> None:
        root = Path(options.get("default_root_dir") or "runs/default")
        options["default_root_dir"] = str(root)
        options["plugins"] = [*_listed(options.get("plugins")), GuardedCheckpointIO()]
        if logger is None or logger is True:
            logger = CSVLogger(root, name="logs", version="")
        _refuse_options(max_epochs, root, options)
        try:
            super().__init__(logger=logger, max_epochs=max_epochs, **options)
        except (MisconfigurationException, ValueError) as error:
            raise ConfigurationError("trainer", str(error)) from error
        self.epochs_per_block = max_epochs
        self.run_folder = RunFolder(root)
        self.evaluation_tokens: dict[str, Tensor] = {}
        self.interruption = Interruption()
        self.settings: Mapping[str, Any] = {}
        self.fingerprint: dict[str, str] = {}
        self.resumes = False
        self.first_epoch = 0
        self._parts = 1
        self._resume: tuple[Path, dict[str, Any]] | None = None
        self._early_stopping: list[tuple[Callback, dict[str, Any]]] = []
        self._refuse_what_cannot_work()

    def _refuse_what_cannot_work(self) -> None:
        _refuse_precision(self.precision)  # a plugin may have set it
        if self.limit_train_batches == 0:
            raise ConfigurationError(
                "trainer.limit_train_batches", "0 learns nothing; for that set trainer.max_epochs to 0"
            )
        if self.max_steps != -1:
            raise ConfigurationError("trainer.max_steps", "steps are not counted across blocks; use trainer.max_epochs")
        if self.num_nodes > 1:
            raise ConfigurationError("trainer.num_nodes", "blocks are calibrated on one device; set it to 1")
        # Launched as several processes with one device each, every one would take itself for the only one.
        if self.world_size > 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigurationError("trainer.devices", "blocks are calibrated on one device; set it to 1")

    @property
    @override
    def received_sigterm(self) -> bool:
        """Never: Lightning would leave at once, the calibration obeys signals where nothing gets lost."""
        return False

    @override
    def _fit_impl(
        self,
        model: LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        ckpt_path: Any = None,
        weights_only: bool | None = None,
    ) -> None:
        assert isinstance(model, OmniQuantModel)
        assert isinstance(datamodule, CalibrationData)
        checkpoint = self._checkpoint_of(ckpt_path)
        with self.interruption.listening():
            tokens = self.prepare(model, datamodule)
            self.announce("on_ready", model)
            with self.run_folder.locked():
                self._calibrate(model, datamodule, tokens, checkpoint)
        self.training = False

    def _checkpoint_of(self, ckpt_path: Any) -> Path:
        """Decides whether an earlier run is gone on with, and from which checkpoint inside a block."""
        self.resumes = ckpt_path is not None or is_requeued()
        if ckpt_path in (None, "last"):
            return self.run_folder.checkpoint
        path = Path(ckpt_path)
        if not path.is_file():
            message = f"{path} is not a file; last goes on from where the run in {self.run_folder.path} was interrupted"
            raise ConfigurationError("ckpt_path", message)
        return path

    def _calibrate(self, model: OmniQuantModel, datamodule: CalibrationData, tokens: Tensor, checkpoint: Path) -> None:
        self.fingerprint = fingerprint(self.settings, model.source.folder, tokens)
        force = any(getattr(callback, "force", False) for callback in self._calibration_callbacks)
        finished = FinishedBlocks(self.run_folder, self.fingerprint, self.resumes, force)
        finished.refuse_other(len(model.source), checkpoint)
        if self.resumes:
            self.run_folder.keep_log()
            found = load_latest(checkpoint, lambda content: "calibration" in content)
            self._resume = None if found is None else (found[0], found[1]["calibration"])
        elif self.is_global_zero:
            self.run_folder.start()
        self.announce("on_calibration_start", model)
        self.announce("on_baseline", model)
        self._early_stopping = [(c, c.state_dict()) for c in self.early_stopping_callbacks]
        order = BatchOrder(len(tokens), _seed(), datamodule.shuffle)
        engine = Engine(
            self.strategy.root_device,
            self._storage(model, tokens),
            self.precision_plugin.forward_context,
            self._fit_block,
            self.announce,
            self.interruption.obey,
        )
        with self.interruption.deferred():
            Calibration(model, tokens, datamodule.batch_size, order, engine, finished).run()
        self.announce("on_calibration_end", model)
        if self.is_global_zero:
            self.run_folder.remove_checkpoints()

    def _storage(self, model: OmniQuantModel, tokens: Tensor) -> Storage:
        """Where the streams are kept: two in front of a block, two behind it, and the targets of its window."""
        device, dtype = self.strategy.root_device, model.activation_dtype
        count = 4 + model.window.blocks
        size = tokens.numel() * model.source.config.hidden_size * dtype.itemsize
        return Storage(place_for(count * size, model.activation_budget, device), dtype, device, self.run_folder.streams)

    def _fit_block(self, block: BlockModule, batches: StreamBatches) -> None:
        """Lets Lightning fit one block, on the trainer that has fitted those before it."""
        if not list(block.parameters()):  # neither clipping nor transform: nothing to learn
            return
        self.training = True
        self.should_stop = False
        self.state.status = TrainerStatus.RUNNING
        resume, self._resume = self._resume, None
        if resume is not None and resume[1]["first"] != block.index:
            resume = None
        # Lightning counts epochs over the trainer's life and would run none for a second block.
        self.first_epoch = self.current_epoch
        self.fit_loop.max_epochs = self.first_epoch + self.epochs_per_block
        if resume is not None:
            self.first_epoch, self.fit_loop.max_epochs = resume[1]["first_epoch"], resume[1]["max_epochs"]
        batches.sampler.start_block(self.first_epoch)
        block.steps = self._steps(len(batches))
        # It also keeps what EarlyStopping has seen: a later block would stop by the losses of an earlier one.
        for callback, state in self._early_stopping:
            callback.load_state_dict(copy.deepcopy(state))
        self._data_connector.attach_data(block, train_dataloaders=batches)
        block.parts = self._parts
        self._run(block, ckpt_path=None if resume is None else resume[0])
        self._parts = block.parts
        # Or Lightning would hold on to the optimizer's state and the block's streams until the next one comes.
        self.strategy.optimizers, self.strategy.lr_scheduler_configs = [], []
        self.fit_loop._combined_loader = None
        self.fit_loop._data_source.instance = None

    def _steps(self, batches: int) -> int:
        """Optimizer steps of a block, for so many batches an epoch."""
        limit = self.limit_train_batches
        used = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        return self.epochs_per_block * math.ceil(used / self.accumulate_grad_batches)

    def prepare(self, model: OmniQuantModel, data: CalibrationData) -> Tensor:
        """Opens model and data and refuses what cannot work, before any work.

        Returns:
            Calibration token ids ``[samples, tokens]``.

        Raises:
            ConfigurationError: If model or data cannot be used; it names the setting.
        """
        model.verify()
        _bind(data, model)
        self.evaluation_tokens = data.evaluation_tokens()
        return data.calibration_tokens()

    def evaluation(self, model: OmniQuantModel) -> Evaluation:
        """Returns what measures the perplexities of the run; :meth:`prepare` comes first."""
        device, context = self.strategy.root_device, self.precision_plugin.forward_context
        return Evaluation(model, self.run_folder, self.evaluation_tokens, device, context)

    def announce(self, hook: str, *arguments: Any) -> None:
        """Calls a hook of :class:`CalibrationCallback` on every callback that has it: in order, an end in reverse."""
        callbacks = self._calibration_callbacks
        for callback in reversed(callbacks) if hook.endswith("_end") else callbacks:
            getattr(callback, hook)(self, *arguments)

    @property
    def _calibration_callbacks(self) -> list[CalibrationCallback]:
        callbacks: list[Callback] = self.callbacks  # type: ignore[attr-defined]
        return [callback for callback in callbacks if isinstance(callback, CalibrationCallback)]

    @override
    def test(  # type: ignore[override]
        self,
        model: OmniQuantModel,
        datamodule: CalibrationData,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> dict[str, dict[str, float]]:
        """Measure the perplexity of a finished run, next to full precision and round-to-nearest.

        Args:
            model: The run's model settings.
            datamodule: What to evaluate on.
            ckpt_path: Not used; a run's configuration may carry it.
            weights_only: Likewise.

        Returns:
            Perplexity by name of the evaluation set and variant, which ``metrics.json`` holds from now on as well.

        Raises:
            ConfigurationError: If the run is not finished or does not fit the settings.
        """
        del ckpt_path, weights_only
        self.prepare(model, datamodule)
        evaluation = self.evaluation(model)
        perplexities: dict[str, dict[str, float]] = {}
        for variant in reversed(VARIANTS):  # an unfinished run is refused at once
            for name, value in evaluation.measure(variant).items():
                perplexities.setdefault(name, {})[variant] = value
        metrics = self.run_folder.read_metrics()
        self.run_folder.write_metrics(metrics | {"perplexity": metrics.get("perplexity", {}) | perplexities})
        Console().print(perplexity_table(perplexities))
        return perplexities

    def export(
        self,
        model: OmniQuantModel,
        datamodule: CalibrationData,
        format: FormatName = "hf",  # noqa: A002 (the flag)
        output: str | None = None,
        dtype: StorageDtype | None = None,
        shard_bytes: int = 5_000_000_000,
        verify: bool = False,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> Path:
        """Write a finished run in a format that other programs load.

        Args:
            model: The run's model settings.
            datamodule: What to verify with: the first evaluation set.
            format: hf: a plain transformers folder with dequantized weights; packed: codes as
                ``generate`` computes with them, any scheme; gptq: what transformers loads with gptqmodel;
                compressed-tensors: what it loads with that package, activations as well;
                gguf: a file that llama.cpp loads; mlc: weights for MLC-LLM.
            output: The folder to create or replace; null: named after the format, in the run folder.
            dtype: Storage of the tensors that are not quantized; null: what holds them exactly.
            shard_bytes: Largest size of one file.
            verify: Load the result with the programs it is meant for, those that are installed, and compare its logits
                with the calibrated model's.
            ckpt_path: Not used; a run's configuration may carry it.
            weights_only: Likewise.

        Returns:
            The folder.

        Raises:
            ConfigurationError: If the run is not finished, or the format cannot hold it exactly.
            CalibrationError: If a program computes other logits; the folder stays.
        """
        del ckpt_path, weights_only
        export = open_format(format, model, dtype, shard_bytes)
        verification = Verification(export, _first_window(datamodule, model)) if verify else None
        folder = self.run_folder.model if format == "hf" else self.run_folder.path / format
        folder = folder if output is None else Path(output)
        export.write(model, self.run_folder, folder)
        Console().print(f"{format}: {folder}", soft_wrap=True)
        if verification is not None:
            results = verification.run(model, self.run_folder, folder)
            Console().print(verification_table(results))
            refuse_differing(results)
        return folder

    def generate(
        self,
        model: OmniQuantModel,
        datamodule: CalibrationData,
        prompt: str | None = None,
        chat: bool = False,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        packed: str | None = None,
        device: str | None = None,
        dtype: StorageDtype | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> Generation:
        """Generate text with the packed model of a finished run.

        Args:
            model: The run's model settings.
            datamodule: Not used; a run's configuration has it.
            prompt: The text to go on from.
            chat: Put the prompt into the tokenizer's chat template, and show the answer alone.
            max_new_tokens: Tokens to generate at most; fewer where the model ends the text or has no positions left.
            temperature: 0 takes the likeliest token; otherwise what the logits are divided by before one is drawn.
            top_k: Draw among so many of the likeliest tokens; null: among all.
            top_p: Draw among the likeliest tokens that together have this probability; null: among all.
            seed: Of the draws.
            packed: A packed folder to load instead of the run's model; null: packed/ in the run folder, or, where that
                is missing or older than the run, the run's model, packed in memory.
            device: Where to compute, such as cpu or cuda; null: the trainer's device.
            dtype: What is not quantized is held and computed in it; null: float32 on a CPU, bfloat16 elsewhere.
            ckpt_path: Not used; a run's configuration may carry it.
            weights_only: Likewise.

        Returns:
            The tokens and how long they took.

        Raises:
            ConfigurationError: If the run or the folder cannot be used, or a setting is out of range.
        """
        del datamodule, ckpt_path, weights_only
        sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed)
        if not prompt:
            raise ConfigurationError("prompt", "give the text to go on from, such as --prompt 'Once'")
        target = self.strategy.root_device if device is None else usable_device(device)
        usual: StorageDtype = "float32" if target.type == "cpu" else "bfloat16"
        folder = None if packed is None else Path(packed)
        network, tokenizer = open_runnable(model, self.run_folder, folder, getattr(torch, dtype or usual), target)
        result = generate(network, tokenizer, prompt, sampling, chat, write_terminal)
        Console().print("", generation_table(result), memory_line(network), sep="\n", soft_wrap=True)
        return result


def _refuse_options(max_epochs: int, root: Path, options: Mapping[str, Any]) -> None:
    """Refuses what makes no sense block by block, before Lightning looks at it."""
    if options.get("max_time") is not None:
        raise ConfigurationError("trainer.max_time", "time is not counted across blocks; use trainer.max_epochs")
    if options.get("fast_dev_run"):
        raise ConfigurationError("trainer.fast_dev_run", "use data.samples and trainer.max_epochs for a short run")
    if max_epochs < 0:
        raise ConfigurationError("trainer.max_epochs", f"{max_epochs} is below 0")
    if root.exists() and not root.is_dir():
        raise ConfigurationError("trainer.default_root_dir", f"{root} is not a folder")
    _refuse_precision(options.get("precision"))


def _listed(plugins: Any) -> list[Any]:
    if plugins is None:
        return []
    return list(plugins) if isinstance(plugins, list | tuple) else [plugins]


def _refuse_precision(precision: str | int | None) -> None:
    """Before Lightning replaces what the device does not have: 16-mixed would pass on a CPU."""
    if precision not in (None, 32, "32", "bf16", *_PRECISIONS):
        raise ConfigurationError(
            "trainer.precision",
            f"{precision} would round the factors; accepted: {', '.join(_PRECISIONS)}",
        )


def _bind(data: CalibrationData, model: OmniQuantModel) -> None:
    """Tells the data for which model they are."""
    source = model.source
    data.bind(TextSettings(source.tokenizer, source.positions, int(source.config.vocab_size), _seed()))


def _first_window(data: CalibrationData, model: OmniQuantModel) -> Tensor:
    """Token ids ``[1, tokens]`` of the first evaluation set."""
    _bind(data, model)
    return next(iter(data.evaluation_tokens().values()))[:1]


def _seed() -> int:
    """The seed that Lightning was given, or the published one."""
    return int(os.environ.get("PL_GLOBAL_SEED", "2"))
