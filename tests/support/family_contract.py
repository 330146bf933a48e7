"""What every family has to hold, checked on tiny random models of transformers' own classes."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from kept_blocks import KeepBlocks
from omniquant_pl.blocks.factors import BlockFactors
from omniquant_pl.callbacks import FoldCallback
from omniquant_pl.checkpoint import SourceModel
from omniquant_pl.data import CalibrationData
from omniquant_pl.export import HfExport
from omniquant_pl.families import family_of
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.nn.attention import capped_attention
from omniquant_pl.spec import ActivationSpec, TransformSpec, WeightSpec
from omniquant_pl.trainer import SequentialTrainer

TOKENS = 24


class _AttentionInputs(TorchFunctionMode):
    """Keeps queries, keys and values of every call of torch's attention, and of ours with capped logits."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            self.seen.extend(args[:3])
        return func(*args, **(kwargs or {}))

    def capped(self, *args: Any) -> Tensor:
        self.seen.extend(args[:3])
        return capped_attention(*args)


class FamilyContract:
    """Checks of one family; models are made from configurations, in a folder of the test's own.

    Args:
        folder: Where models and runs are written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, config: PretrainedConfig) -> Path:
        """Saves a random model as transformers saves it; norms and biases are random as well."""
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1:
                    parameter += 0.3 * torch.randn_like(parameter)
                elif parameter.std() < 0.05 and "embed" not in name:  # so that blocks do something
                    parameter.normal_(std=0.2)
        folder = self.folder / "source"
        model.save_pretrained(folder)
        return folder

    def tokens(self, config: PretrainedConfig) -> Tensor:
        """Token ids `[3, 24]`."""
        vocabulary = config.get_text_config().vocab_size
        return torch.randint(2, vocabulary, (3, TOKENS), generator=torch.Generator().manual_seed(1))

    def expected_logits(self, folder: Path, tokens: Tensor) -> Tensor:
        """What transformers alone computes, with the attention that is written in the model's own file."""
        attention = family_of(AutoConfig.from_pretrained(folder)).attention or "eager"
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
        with torch.no_grad():
            return model.eval()(tokens).logits

    def equivalence_error(self, config: PretrainedConfig) -> float:
        """Largest logit error, over the largest logit, under random scales and shifts of every pair."""
        folder, tokens = self.save(config), self.tokens(config)
        source = SourceModel(folder)
        calls, hidden = source.calls(TOKENS), source.embed(tokens)
        for index, layout in enumerate(source.layouts):
            tensors = source.block_tensors(index)
            factors = BlockFactors(
                layout, tensors, WeightSpec(), source.attention, transform=TransformSpec(mlp=True), shift=True
            )
            generator = torch.Generator().manual_seed(index)
            pairs = dict(factors.named_pairs())
            assert set(pairs) == {pair.name for pair in (*layout.pairs, *layout.mlp_pairs)}
            for pair in pairs.values():
                pair.scale.data = torch.exp(0.5 * torch.randn(pair.scale.shape, generator=generator))
                if pair.shift is not None:
                    pair.shift.data = 0.5 * torch.randn(pair.shift.shape, generator=generator)
            transformed = factors.transformed(tensors)
            for name, pair in pairs.items():
                changed = [tensor for tensor in pair.changed if tensor in tensors]
                assert len(changed) > 1, name
                assert all(not torch.equal(transformed[t], tensors[t]) for t in changed), name
            with torch.no_grad():
                hidden = calls[index](source.make_block(index, transformed), hidden)
        expected = self.expected_logits(folder, tokens)
        return float((source.logits(hidden) - expected).abs().max() / expected.abs().max())

    def shifted(self, config: PretrainedConfig) -> set[str]:
        """Names of the first block's pairs that can learn a shift."""
        source = SourceModel(self.save(config))
        tensors = source.block_tensors(0)
        factors = BlockFactors(
            source.layouts[0], tensors, WeightSpec(), source.attention, transform=TransformSpec(mlp=True), shift=True
        )
        return {name for name, pair in factors.named_pairs() if pair.shift is not None}

    def unlisted(self, config: PretrainedConfig, index: int = 0) -> set[str]:
        """Weight matrices of transformers' own block that the layout does not quantize, experts counted as whole."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        source = SourceModel(self.save(config))
        block = model.get_submodule(source.family.blocks)[index]
        layout = source.layouts[index]
        matrices = {
            f"{name}.{leaf}" if leaf != "weight" else name
            for name, module in block.named_modules()
            for leaf, parameter in module.named_parameters(recurse=False)
            if parameter.ndim > 1
        }
        linears = {name for name, module in source._templates[index].named_modules() if isinstance(module, nn.Linear)}
        assert set(layout.linears) <= linears
        listed = set(layout.linears)
        if layout.experts is not None:
            parts = {f"{layout.experts.module}.{leaf}" for leaf in ("gate_up_proj", "down_proj")}
            inside = {name for name in linears if name.startswith(f"{layout.experts.module}.")}
            assert inside <= listed
            listed |= parts if inside else set()
        return matrices - listed

    def round_trip_error(
        self,
        config: PretrainedConfig,
        activations: ActivationSpec | None = None,
        stored_as: Path | None = None,
        **settings: Any,
    ) -> float:
        """Calibrates, exports, loads in plain transformers: error against the calibrated blocks' logits.

        With quantized activations, which plain transformers does not have, only the weights are compared: the
        calibrated blocks run with their inputs in full precision. The same model may be read from another folder.
        """
        folder, tokens = self.save(config), self.tokens(config)
        model = OmniQuantModel(
            str(stored_as or folder), WeightSpec(4, 16), activations, transform=TransformSpec(mlp=True), **settings
        )
        np.save(self.folder / "tokens.npy", tokens.numpy())
        keep = KeepBlocks()
        trainer = SequentialTrainer(
            max_epochs=1,
            callbacks=[FoldCallback(), keep],
            default_root_dir=self.folder / "run",
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        path = str(self.folder / "tokens.npy")
        trainer.fit(model, datamodule=CalibrationData(dataset=path, samples=3, evaluation=[path]))
        HfExport().write(model, trainer.run_folder, self.folder / "exported")
        source = model.source
        hidden = source.embed(tokens)
        for index, block in enumerate(keep.blocks):
            plain = source.make_block(index, block.tensors)
            with torch.no_grad():
                hidden = block.call(plain, hidden)
        calibrated = source.logits(hidden)
        found = self.expected_logits(self.folder / "exported", tokens)
        assert torch.isfinite(found).all()
        original = self.expected_logits(folder, tokens)
        assert not torch.allclose(found, original, rtol=1e-3, atol=1e-3), "nothing was quantized"
        return float((found - calibrated).abs().max() / calibrated.abs().max())

    def quantized_attention_inputs(self, config: PretrainedConfig, bits: int = 2) -> list[int]:
        """Distinct values per token and head that attention sees for queries, keys and values at these bits.

        They are looked at where torch's attention is about to run, whoever calls it and whatever quantizes for it.
        """
        folder, tokens = self.save(config), self.tokens(config)
        model = OmniQuantModel(str(folder), WeightSpec(8), ActivationSpec(bits))
        source = model.source
        tensors, call = source.block_tensors(0), source.calls(TOKENS)[0]
        block = model.round_to_nearest(0, tensors, call)
        with _AttentionInputs() as attention, pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setattr("omniquant_pl.nn.attention.capped_attention", attention.capped)
            block(source.embed(tokens))
        assert all(states.shape[-1] > 2**bits for states in attention.seen), "as many values as levels"
        counts = [max(len(row.unique()) for row in states.flatten(0, -2)) for states in attention.seen]
        assert max(counts) <= 2**bits
        return counts

    def tie(self, config: PretrainedConfig, stored: str) -> Path:
        """Saves a model whose configuration ties head and embedding, and stores those of them that are wanted.

        Args:
            config: The model's.
            stored: ``both``, which differ; ``equal``; ``head`` alone; ``embedding`` alone.
        """
        config = deepcopy(config)
        config.tie_word_embeddings = False
        folder = self.save(config)
        model = AutoModelForCausalLM.from_pretrained(folder)
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        tensors = load_file(folder / "model.safetensors")
        (embedding_name,) = (name for name, tensor in tensors.items() if torch.equal(tensor, embedding))
        (head_name,) = (name for name, tensor in tensors.items() if torch.equal(tensor, head))
        if stored == "equal":
            tensors[head_name] = embedding.detach().clone()
        elif stored != "both":
            del tensors[embedding_name if stored == "head" else head_name]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
        return folder

    def logits(self, source: SourceModel, tokens: Tensor) -> Tensor:
        """What the blocks compute one after the other, as they are stored."""
        calls, hidden = source.calls(TOKENS), source.embed(tokens)
        with torch.no_grad():
            for index, call in enumerate(calls):
                hidden = call(source.make_block(index, source.block_tensors(index)), hidden)
            return source.logits(hidden)


class FamilyTests:
    """The tests that every family has; a subclass is parametrized over the family's configurations."""

    def unquantized(self, config: PretrainedConfig) -> set[str]:
        """Weight matrices of the first block that stay in full precision."""
        return set()

    def test_equivalence(self, contract: FamilyContract, config: PretrainedConfig) -> None:
        assert contract.equivalence_error(config) <= 1e-5

    def test_linears(self, contract: FamilyContract, config: PretrainedConfig) -> None:
        assert contract.unlisted(config) == self.unquantized(config)

    @pytest.mark.parametrize("activations", [None, ActivationSpec(6)], ids=["weights", "activations"])
    def test_round_trip(
        self, contract: FamilyContract, config: PretrainedConfig, activations: ActivationSpec | None
    ) -> None:
        assert contract.round_trip_error(config, activations) <= 1e-5

    @pytest.mark.parametrize("stored", ["both", "equal", "head", "embedding"])
    def test_what_is_stored_decides_what_is_tied(
        self, contract: FamilyContract, config: PretrainedConfig, stored: str
    ) -> None:
        folder, tokens = contract.tie(config, stored), contract.tokens(config)
        source, expected = SourceModel(folder), contract.expected_logits(folder, tokens)
        torch.testing.assert_close(contract.logits(source, tokens), expected, rtol=1e-5, atol=1e-5)
        assert source.is_tied == (stored != "both")
        assert source.config_json["tie_word_embeddings"] == source.is_tied

    def test_attention_inputs(self, contract: FamilyContract, config: PretrainedConfig) -> None:
        assert max(contract.quantized_attention_inputs(config)) <= 4
