"""Train the small LLaMA that ships with the package, on the text that ships with Python.

The model is a test bed for quantization, so after training some channels are made outliers by a
rescaling that leaves the function unchanged. ``--raw`` keeps the model before the rescaling, and
where it is there already it is read back instead of training anew.

    python scripts/train_tiny_llama.py --output omniquant_pl/models/tiny-llama
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from outlier_channels import OutlierSpec, add_outliers, relative_error
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from omniquant_pl.data.builtin import builtin_text

VOCABULARY = 2048
POSITIONS = 256
LARGEST_ERROR = 1e-5


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 2,048 entries; adds no special token by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.split("\n\n"), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> Tensor:
    """Token ids, int64 [tokens]."""
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"])


def build_model(seed: int) -> LlamaForCausalLM:
    """Return a freshly initialised LLaMA of 2.4 M parameters, float32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        use_cache=True,
    )
    return LlamaForCausalLM(config)


def loss_of(model: LlamaForCausalLM, windows: Tensor) -> Tensor:
    """Mean negative log-likelihood of int64 [batch, length], the first token not predicted."""
    logits = model(windows, use_cache=False).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, tokens: Tensor, windows: int | None = None) -> float:
    """Perplexity over non-overlapping windows of the model's positions, in float32."""
    chunks = tokens[: len(tokens) // POSITIONS * POSITIONS].view(-1, POSITIONS)[:windows]
    losses = [loss_of(model, batch) * len(batch) for batch in torch.split(chunks, 32)]
    return math.exp(float(sum(losses)) / len(chunks))


def optimizer_of(model: LlamaForCausalLM, lr: float) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves the norms alone."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    groups: list[dict[str, Any]] = [
        {"params": matrices},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), weight_decay=0.1)


def batches(tokens: Tensor, size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Random windows of the token stream, int64 [size, positions]."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(POSITIONS)
    for _ in range(steps):
        starts = torch.randint(len(tokens) - POSITIONS, (size, 1), generator=generator)
        yield tokens[starts + offsets]


def train_model(train: Tensor, held_out: Tensor, options: argparse.Namespace) -> LlamaForCausalLM:
    """Train for a fixed number of steps, warm-up then cosine, and print the progress."""
    model = build_model(options.seed)
    optimizer = optimizer_of(model, options.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.lr, options.steps, pct_start=0.1, cycle_momentum=False, div_factor=100
    )
    started = time.perf_counter()
    for step, batch in enumerate(batches(train, options.batch, options.steps, options.seed), 1):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=options.bf16):
            loss = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % options.interval == 0 or step == options.steps:
            seen, unseen = perplexity(model, train, 64), perplexity(model, held_out)
            elapsed = time.perf_counter() - started
            print(f"{step} {elapsed:.0f} s: train {seen:.2f}, held out {unseen:.2f}", flush=True)
    return model


def obtain_model(tokenizer: PreTrainedTokenizerFast, held_out: Tensor, options: argparse.Namespace) -> LlamaForCausalLM:
    """Return the model before rescaling: read from ``--raw`` where that is there, else trained."""
    if options.raw is not None and options.raw.exists():
        model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(options.raw)
        return model
    model = train_model(encode(tokenizer, builtin_text("train")), held_out, options)
    if options.raw is not None:
        model.save_pretrained(options.raw)
    return model


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the checkpoint in float16, and its tokenizer under a class that every loader knows."""
    model.half().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # was written for the owner alone
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--raw", type=Path, help="folder that keeps the model before rescaling")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--batch", type=int, default=16, help="windows a step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--interval", type=int, default=100, help="steps between measurements")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--norm-channels", type=int, default=2)
    parser.add_argument("--norm-range", type=float, nargs=2, default=(12.0, 40.0))
    parser.add_argument("--value-channels", type=int, default=3)
    parser.add_argument("--value-range", type=float, nargs=2, default=(6.0, 15.0))
    return parser.parse_args()


def write_card(folder: Path, options: argparse.Namespace, spec: OutlierSpec, results: dict[str, float]) -> None:
    """Write the model card with the numbers of this run."""
    template = Path(__file__).with_name("tiny_llama_card.md").read_text(encoding="utf-8")
    values = vars(options) | vars(spec) | results | {"python": platform.python_version()}
    (folder / "README.md").write_text(template.format(**values), encoding="utf-8")


def rescale(model: LlamaForCausalLM, spec: OutlierSpec, held_out: Tensor) -> float:
    """Add outliers in place; returns the relative error of the logits, RuntimeError above 1e-5."""
    original = copy.deepcopy(model)
    add_outliers(model, spec)
    error = relative_error(original, model, held_out[: 8 * POSITIONS].view(8, POSITIONS))
    print(f"relative error of the logits after rescaling: {error:.1e}")
    if error > LARGEST_ERROR:
        raise RuntimeError(f"the rescaling changed the logits by {error:.1e}")
    return error


def main() -> None:
    """Tokenizer, training, rescaling, saving, card."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    tokenizer = train_tokenizer(builtin_text("train"))
    held_out = encode(tokenizer, builtin_text("evaluation"))
    model = obtain_model(tokenizer, held_out, options)
    trained = perplexity(model, held_out)
    spec = OutlierSpec(
        options.norm_channels,
        tuple(options.norm_range),
        options.value_channels,
        tuple(options.value_range),
        options.seed,
    )
    error = rescale(model, spec, held_out)
    save(model, tokenizer, options.output)
    stored = LlamaForCausalLM.from_pretrained(options.output, dtype=torch.float32)
    results = {"error": error, "trained": trained, "stored": perplexity(stored, held_out)}
    print(f"held-out perplexity: {trained:.3f}, as stored {results['stored']:.3f}")
    write_card(options.output, options, spec, results)


if __name__ == "__main__":
    main()
