"""Names that people bring from other quantization tools and trainers, and what they are called here."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

__all__ = ["COMMANDS", "HINTS", "KEYS", "command_for"]

KEYS: Mapping[str, tuple[str, ...]] = {
    "a_bits": ("model.activations.bits",),
    "abits": ("model.activations.bits",),
    "act_bits": ("model.activations.bits",),
    "alpha": ("model.transform.alpha",),
    "base_model": ("model.path",),
    "bit": ("model.weights.bits", "model.activations.bits"),
    "bits": ("model.weights.bits", "model.activations.bits"),
    "bsz": ("data.batch_size",),
    "calib": ("data.dataset",),
    "calib_data": ("data.dataset",),
    "calib_dataset": ("data.dataset",),
    "calibration": ("data.dataset",),
    "calibration_dataset": ("data.dataset",),
    "checkpoint_dir": ("trainer.default_root_dir",),
    "checkpoint_path": ("ckpt_path", "model.path"),
    "ckpt": ("ckpt_path", "model.path"),
    "ctx": ("data.sequence_length",),
    "data": ("data.dataset",),
    "device": ("trainer.accelerator", "trainer.devices"),
    "epoch": ("trainer.max_epochs",),
    "epochs": ("trainer.max_epochs",),
    "eval": ("data.evaluation",),
    "eval_dataset": ("data.evaluation",),
    "gpus": ("trainer.devices",),
    "groupsize": ("model.weights.group_size",),
    "iters": ("trainer.max_epochs",),
    "learning_rate": ("model.clipping.lr", "model.transform.lr"),
    "length": ("data.sequence_length",),
    "let_lr": ("model.transform.lr",),
    "logdir": ("trainer.default_root_dir",),
    "lr": ("model.clipping.lr", "model.transform.lr"),
    "lwc_lr": ("model.clipping.lr",),
    "max_length": ("data.sequence_length",),
    "max_seq_len": ("data.sequence_length",),
    "max_seq_length": ("data.sequence_length",),
    "model": ("model.path",),
    "model_dir": ("model.path",),
    "model_id": ("model.path",),
    "model_name": ("model.path",),
    "model_name_or_path": ("model.path",),
    "n_gpu": ("trainer.devices",),
    "n_samples": ("data.samples",),
    "name": ("model.path",),
    "nsamples": ("data.samples",),
    "num_calibration_samples": ("data.samples",),
    "num_epochs": ("trainer.max_epochs",),
    "num_gpus": ("trainer.devices",),
    "num_samples": ("data.samples",),
    "num_train_epochs": ("trainer.max_epochs",),
    "out": ("trainer.default_root_dir",),
    "out_dir": ("trainer.default_root_dir",),
    "outdir": ("trainer.default_root_dir",),
    "output": ("trainer.default_root_dir",),
    "output_dir": ("trainer.default_root_dir",),
    "preset": ("config",),
    "pretrained": ("model.path",),
    "q_group_size": ("model.weights.group_size",),
    "random_seed": ("seed_everything",),
    "save": ("trainer.default_root_dir",),
    "save_dir": ("trainer.default_root_dir",),
    "save_path": ("trainer.default_root_dir",),
    "scheme": ("config",),
    "seed": ("seed_everything",),
    "seq_len": ("data.sequence_length",),
    "seqlen": ("data.sequence_length",),
    "sym": ("model.weights.symmetric",),
    "train_batch_size": ("data.batch_size",),
    "w_bit": ("model.weights.bits",),
    "w_bits": ("model.weights.bits",),
    "wbits": ("model.weights.bits",),
    "wd": ("model.learning.weight_decay",),
}
"""What a flag is called here; several, where it may mean each of them."""

HINTS: Mapping[str, str] = {
    "bf16": "write --trainer.precision bf16-mixed",
    "chat": "text comes from the command generate, which has --prompt and --chat",
    "cpu": "write --trainer.accelerator cpu",
    "cuda": "write --trainer.accelerator gpu",
    "eval_ppl": "fit measures perplexity in the end, on what --data.evaluation lists",
    "fp16": "factors are learned in 32-true or bf16-mixed: --trainer.precision bf16-mixed",
    "gpu": "write --trainer.accelerator gpu",
    "let": "the transformation is learned where model.transform has settings, as in --config w4a4.yaml",
    "limit": "tasks are measured by the command test, which has --zero_shot and --limit",
    "lwc": "clipping is learned unless --model.clipping is null",
    "mixed_precision": "write --trainer.precision bf16-mixed",
    "prompt": "text comes from the command generate, which has --prompt",
    "push_to_hub": "uploading is an option of the command export: --push owner/name",
    "resume": "a run goes on with --ckpt_path last",
    "resume_from_checkpoint": "a run goes on with --ckpt_path last",
    "tasks": "tasks are measured by the command test: --zero_shot '[piqa, arc_easy]'",
    "teraflops": "an estimate comes from the command plan, which has --teraflops",
    "verbose": "what is written to the terminal is set by --progress.quiet",
    "zero_shot": "tasks are measured by the command test: --zero_shot '[piqa, arc_easy]'",
}
"""What to do instead, where another command does it."""

COMMANDS: Mapping[str, Sequence[str]] = {
    "fit": ("train", "quantize", "quant", "calibrate", "calib", "run", "optimize", "start", "resume", "finetune"),
    "test": ("eval", "evaluate", "validate", "ppl", "perplexity", "measure", "predict"),
    "export": ("convert", "save", "pack", "upload", "push", "deploy"),
    "generate": ("chat", "infer", "inference", "complete", "prompt", "serve"),
    "compare": ("benchmark", "bench", "sweep", "methods"),
    "plan": ("estimate", "size", "memory"),
}
"""What other programs call the commands."""


def command_for(word: str, commands: Sequence[str]) -> str | None:
    """Return the command that a word was meant for, ``None`` if it is like none of them."""
    spellings = {synonym: command for command, synonyms in COMMANDS.items() for synonym in synonyms}
    spellings |= {command: command for command in commands}
    found = difflib.get_close_matches(word.lower(), spellings, 1, 0.7)
    return spellings[found[0]] if found else None
