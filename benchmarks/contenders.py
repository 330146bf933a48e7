"""Ways to take one calibration step of one LLaMA block, on the same weights, inputs and starting factors."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from formula import FormulaBlock, Shape
from random_llama import save_random_llama
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig

from omniquant_pl.blocks.module import BlockModule
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.quant import observe_inputs
from omniquant_pl.spec import ActivationSpec, TransformSpec, WeightSpec

__all__ = ["SCHEMES", "SHAPES", "Problem", "Scheme", "Step", "make_problem", "shape_of"]


@dataclass(frozen=True)
class Scheme:
    """Widths, and whether the transformation is learned besides clipping."""

    bits: int
    group_size: int | None = None
    activation_bits: int | None = None


SCHEMES = {
    "w3a16": Scheme(3),
    "w4a16g128": Scheme(4, 128),
    "w4a4": Scheme(4, activation_bits=4),
}

SHAPES = {
    "scaled": Shape(1024, 2816, 16, 16, 512),
    "llama-7b": Shape(4096, 11008, 32, 32, 2048),
    "llama-8b": Shape(4096, 14336, 32, 8, 2048),
    "llama-70b": Shape(8192, 28672, 64, 8, 2048),
}


def shape_of(model: str, tokens: int) -> Shape:
    """Sizes of a LLaMA checkpoint's blocks."""
    config = AutoConfig.from_pretrained(model)
    return Shape(
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        tokens,
    )


@dataclass
class Step:
    """One way to take the step: ``run`` takes one and returns its loss."""

    name: str
    run: Callable[[], Tensor]


@dataclass
class Problem:
    """A block and a batch."""

    shape: Shape
    scheme: Scheme
    model: OmniQuantModel
    hidden: Tensor
    target: Tensor
    tensors: dict[str, Tensor]
    call: Any
    inputs: Mapping[str, Any]

    def ours(
        self, name: str, context: Callable[[], AbstractContextManager[Any]] = nullcontext, compiles: bool = False
    ) -> Step:
        """Return the package's step, in a loop without Lightning."""
        block = self.model.block(0, self.tensors, self.call, self.inputs, device=self.hidden.device)
        rates = replace(self.model.rates, learning=replace(self.model.learning, compile=compiles))
        module = BlockModule([block], rates).to(self.hidden.device)
        optimizer = cast(torch.optim.Optimizer, module.configure_optimizers())
        module.on_fit_start()

        def run() -> Tensor:
            with context():
                loss = module.training_step((self.hidden, self.target), 0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            block.factors.project()
            return loss.detach()

        return Step(name, run)

    def formula(self) -> Step:
        """Return the plain eager loop."""
        block = self.model.block(0, self.tensors, self.call, self.inputs, device=self.hidden.device)
        scheme, theta = self.scheme, self.model.source.config.rope_parameters["rope_theta"]
        widths = (scheme.bits, scheme.group_size, scheme.activation_bits)
        plain = FormulaBlock(block.tensors, block.factors.export(), self.shape, *widths, theta).to(self.hidden.device)
        transform = [plain.factor(name) for name in plain.names if name.endswith(".scale")]
        clipping = [plain.factor(name) for name in plain.names if ".clip." in name]
        rates = self.model.rates
        groups = [{"params": clipping, "lr": rates.clipping}, {"params": transform, "lr": rates.transform}]
        optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)

        def run() -> Tensor:
            loss = F.mse_loss(plain(self.hidden), self.target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.detach()

        return Step("formula", run)

    def bare(self) -> Step:
        """Forward and backward of the block in full precision, with gradients of its weights: no quantization."""
        block = self.model.source.make_block(0, self.tensors).to(self.hidden.device)
        weights = [nn.Parameter(tensor.clone()) for tensor in block.state_dict().values()]
        names = list(block.state_dict())

        def network(hidden: Tensor, *arguments: Any, **options: Any) -> Tensor:
            overridden: dict[str, Tensor] = dict(zip(names, weights, strict=True))
            return cast(Tensor, torch.func.functional_call(block, overridden, (hidden, *arguments), options))

        def run() -> Tensor:
            loss = F.mse_loss(self.call(network, self.hidden), self.target)
            torch.autograd.grad(loss, weights)
            return loss.detach()

        return Step("bare", run)


def make_problem(
    scheme: Scheme, shape: Shape, device: torch.device, model: str | None = None, samples: int = 1
) -> Problem:
    """Make a block, random unless a checkpoint is given, and a random batch for it."""
    with tempfile.TemporaryDirectory() as folder:
        opened = _open(model or _random_model(Path(folder), shape), scheme)
        source = opened.source
        tensors = source.block_tensors(0)  # read while the folder is there
    call = source.calls(shape.tokens)[0]
    source.to(device)
    hidden = torch.randn(samples, shape.tokens, shape.hidden, generator=torch.Generator().manual_seed(0)).to(device)
    original = source.make_block(0, tensors).to(device)
    with torch.no_grad(), observe_inputs(original, source.layouts[0].linears) as inputs:
        target = call(original, hidden)
    return Problem(shape, scheme, opened, hidden, target, tensors, call, dict(inputs))


def _open(path: str, scheme: Scheme) -> OmniQuantModel:
    activations = None if scheme.activation_bits is None else ActivationSpec(scheme.activation_bits)
    transform = None if activations is None else TransformSpec()
    model = OmniQuantModel(path, WeightSpec(scheme.bits, scheme.group_size), activations, transform=transform)
    assert model.source is not None  # opens it
    return model


def _random_model(folder: Path, shape: Shape) -> str:
    path = save_random_llama(
        folder / "model",
        vocab_size=64,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=1,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.tokens,
    )
    return str(path)
