"""What a step of a block costs under Lightning, over the bare forward, backward and optimizer step.

    python benchmarks/step_overhead.py

Both run the same block on the same batches, in alternation; medians of the repetitions are printed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time

import torch

from omniquant_pl.blocks.module import BlockModule
from omniquant_pl.callbacks import NumericsGuard
from omniquant_pl.cli.program import quieten
from omniquant_pl.hidden_states import BatchOrder, HiddenStateBatches, HiddenStates
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.quant import observe_inputs
from omniquant_pl.spec import ActivationSpec, TransformSpec, WeightSpec
from omniquant_pl.trainer import SequentialTrainer

SAMPLES = 64
EPOCHS = 10


def make_block(model: OmniQuantModel) -> tuple[BlockModule, tuple[torch.Tensor, torch.Tensor]]:
    """Return what learns the first block, and its input and target for random tokens."""
    source = model.source
    length = source.positions
    tokens = torch.randint(0, source.config.vocab_size, (SAMPLES, length), generator=torch.Generator().manual_seed(0))
    hidden, call, tensors = source.embed(tokens), source.calls(length)[0], source.block_tensors(0)
    original = source.make_block(0, tensors)
    with torch.no_grad(), observe_inputs(original, source.layouts[0].linears) as inputs:
        target = call(original, hidden)
    return BlockModule([model.block(0, tensors, call, inputs)], model.rates), (hidden, target)


def bare(module: BlockModule, batches: HiddenStateBatches) -> float:
    """Return seconds per step of a plain loop."""
    optimizer = module.configure_optimizers()
    module.on_fit_start()
    started = time.perf_counter()
    for _ in range(EPOCHS):
        for index, batch in enumerate(batches):
            loss = module.training_step(batch, index)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            module.on_train_batch_end(loss, batch, index)
    return (time.perf_counter() - started) / len(batches) / EPOCHS


def under_lightning(module: BlockModule, batches: HiddenStateBatches, folder: str) -> float:
    """Return seconds per step of some epochs as a calibration runs them, the fixed cost per block included."""
    trainer = SequentialTrainer(
        max_epochs=EPOCHS,
        default_root_dir=folder,
        callbacks=[NumericsGuard()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        accelerator="cpu",
    )
    trainer.strategy._lightning_module = module
    trainer.state.fn = "fit"  # type: ignore[assignment]
    started = time.perf_counter()
    trainer._fit_block(module, batches)
    return (time.perf_counter() - started) / len(batches) / EPOCHS


def main() -> None:
    """Measure and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--model", default="tiny-llama")
    options = parser.parse_args()
    quieten()
    model = OmniQuantModel(options.model, WeightSpec(4), ActivationSpec(4), transform=TransformSpec())
    loops: dict[str, list[float]] = {"bare": [], "lightning": []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.repetitions):
            module, tensors = make_block(model)
            streams = tuple(HiddenStates(tensor, tensor.device) for tensor in tensors)
            batches = HiddenStateBatches(streams, 1, BatchOrder(SAMPLES, 0, False))
            loops["bare"].append(bare(module, batches) * 1e3)
            module, tensors = make_block(model)
            loops["lightning"].append(under_lightning(module, batches, folder) * 1e3)
    medians = {name: statistics.median(values) for name, values in loops.items()}
    print(f"{model.scheme.name}, {torch.get_num_threads()} threads, medians of {options.repetitions} in ms a step")
    print(", ".join(f"{name} {value:.2f}" for name, value in medians.items()))
    print(f"Lightning adds {medians['lightning'] - medians['bare']:.2f} ms")


if __name__ == "__main__":
    main()
