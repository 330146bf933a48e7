"""The model that is given: what can be saved is, of every family and as it is; the rest is refused before it is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    GemmaConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaModel,
    MixtralConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from omniquant_pl import quantize
from omniquant_pl.api.original import save_original
from omniquant_pl.errors import CalibrationError, ConfigurationError

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 32,
    "vocab_size": 64,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**TINY),
    "qwen3": Qwen3Config(**TINY, head_dim=8),
    "gemma": GemmaConfig(**TINY, head_dim=8),
    "mixtral": MixtralConfig(**TINY, num_local_experts=2),
    "opt": OPTConfig(**TINY, ffn_dim=32, word_embed_proj_dim=32),
    "falcon": FalconConfig(**TINY, new_decoder_architecture=True, num_kv_heads=4, alibi=False),
}
INCONSISTENT: dict[str, dict[str, Any]] = {
    "LLaMA-2-chat": {"do_sample": False, "temperature": 0.6, "top_p": 0.9},
    "beams": {"num_beams": 1, "early_stopping": True, "length_penalty": 2.0},
    "a value of its own": {"own": [1, 2], "max_new_tokens": 7},
    "no padding": {"pad_token_id": -1},
}
TOKENS = torch.randint(3, 64, (2, 8), generator=torch.Generator().manual_seed(0))
QUICK = {"trainer.max_epochs": 0, "trainer.accelerator": "cpu"}


def make(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    return model


def quick(model: Any, **arguments: Any) -> PreTrainedModel:
    return quantize(model, **{"calibration": TOKENS, "settings": QUICK, **arguments})


def described(model: PreTrainedModel) -> dict[str, Any]:
    """Everything of a model that a call may not change."""
    return {
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "learns": [parameter.requires_grad for parameter in model.parameters()],
        "dtypes": [parameter.dtype for parameter in model.parameters()],
        "training": [module.training for module in model.modules()],
        "hooks": [len(module._forward_hooks) for module in model.modules()],
        "config": copy.deepcopy(model.config.__dict__),
        "generation": copy.deepcopy(model.generation_config.__dict__),
        "objects": [id(model.config), id(model.generation_config)],
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_the_generation_configuration_is_the_models(family: str) -> None:
    model = make(FAMILIES[family])
    model.generation_config = GenerationConfig(do_sample=False, temperature=0.6, top_p=0.9, eos_token_id=[2, 5])
    with pytest.raises(ValueError, match="temperature"):
        model.generation_config.save_pretrained("nowhere")
    assert quick(model).generation_config.to_dict() == model.generation_config.to_dict()


@pytest.mark.parametrize("kind", INCONSISTENT)
def test_it_is_what_transformers_loads(kind: str, tmp_path: Path) -> None:
    model = make(FAMILIES["llama"])
    model.save_pretrained(tmp_path / "saved")
    GenerationConfig(**INCONSISTENT[kind]).to_json_file(tmp_path / "saved" / "generation_config.json")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    quantized = quick(loaded, output=tmp_path / "run")
    assert quantized.generation_config.to_dict() == loaded.generation_config.to_dict()
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    expected, found = loaded.generation_config.to_dict(), exported.generation_config.to_dict()
    assert {key: value for key, value in found.items() if expected.get(key) != value} == {}
    assert INCONSISTENT[kind].items() <= found.items()


def test_generation_parameters_in_the_configuration_stay_there() -> None:
    model = make(FAMILIES["llama"])
    model.config.top_p = 0.9
    with pytest.raises(ValueError, match="top_p"):
        model.config.save_pretrained("nowhere")
    assert quick(model).config.top_p == model.config.top_p == 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [False, True])
def test_the_model_stays_as_it_is(dtype: torch.dtype, tied: bool) -> None:
    model = make(LlamaConfig(**TINY, tie_word_embeddings=tied), dtype).train()
    model.model.norm.weight.requires_grad_(False)
    model.lm_head.register_forward_hook(lambda module, arguments, output: None)
    model.config.dtype = "float64"  # saving would set it
    model.config.architectures = ["Other"]
    before = described(model)
    quantized = quick(model)
    after = described(model)
    for name, tensor in before.pop("tensors").items():
        assert torch.equal(tensor, after["tensors"][name])
    after.pop("tensors")
    assert after == before
    assert (quantized.dtype, quantized.training) == (dtype, False)
    assert (quantized.lm_head.weight is quantized.model.embed_tokens.weight) == tied


def test_a_head_that_is_the_embedding_though_not_declared_so(tmp_path: Path) -> None:
    model = make(LlamaConfig(**TINY, tie_word_embeddings=False))
    model.lm_head.weight = model.model.embed_tokens.weight
    save_original(model, None, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(TOKENS).logits, model.eval()(TOKENS).logits)


def test_a_value_that_the_dtype_does_not_hold() -> None:
    model = make(FAMILIES["llama"], torch.float16)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:, 0] = 65504.0
        model.model.layers[0].mlp.up_proj.weight[:, 1] = -65504.0
    with pytest.raises((CalibrationError, ConfigurationError), match="up_proj"):
        quick(model, settings={**QUICK, "model.weights.scale_dtype": "bfloat16"})


class _Adapted(nn.Module):
    def merge_and_unload(self) -> None: ...


class _Lora(nn.Linear):
    __module__ = "peft.tuners.lora.layer"


class _Packed(nn.Parameter):
    pass


class _Processor:
    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer


def _with_lora(model: PreTrainedModel) -> Any:
    model.model.layers[0].mlp.up_proj = _Lora(32, 32)
    return model


def _quantized(model: PreTrainedModel) -> Any:
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    return model


def _with_quantizer(model: PreTrainedModel) -> Any:
    model.hf_quantizer = object()
    return model


def _offloaded(model: PreTrainedModel) -> Any:
    from accelerate import cpu_offload

    return cpu_offload(model, torch.device("cpu"))


def _dispatched(model: PreTrainedModel) -> Any:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    add_hook_to_module(model.model.layers[0], AlignDevicesHook(torch.device("cpu")))
    return model


def _packed(model: PreTrainedModel) -> Any:
    weight = model.model.layers[0].mlp.up_proj.weight
    model.model.layers[0].mlp.up_proj.weight = _Packed(weight.detach())
    return model


def _in_8_bits(model: PreTrainedModel) -> Any:
    codes = torch.zeros(32, 32, dtype=torch.int8)
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(codes, requires_grad=False)
    return model


def _parametrized(model: PreTrainedModel) -> Any:
    nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)
    return model


REFUSED: dict[str, tuple[Callable[[PreTrainedModel], Any], str]] = {
    "a name": (lambda _: "tiny-llama", "'tiny-llama' is no transformers model; load one by AutoModelForCausalLM"),
    "another module": (lambda _: nn.Linear(2, 2), "a Linear is no transformers model"),
    "PEFT": (lambda _: _Adapted(), "a _Adapted has adapters; merge them first: model.merge_and_unload"),
    "compiled": (torch.compile, "a OptimizedModule wraps another model; give that one, model._orig_mod"),
    "data parallel": (nn.DataParallel, "a DataParallel wraps another model; give that one, model.module"),
    "PEFT inside": (_with_lora, "it has adapters that are not merged"),
    "quantized": (_quantized, "it is quantized already"),
    "a quantizer": (_with_quantizer, "it is quantized already"),
    "packed": (_packed, "model.layers.0.mlp.up_proj.weight is a _Packed, not a plain parameter"),
    "codes": (_in_8_bits, "model.layers.0.mlp.up_proj.weight is int8; load the original in float32"),
    "parametrized": (_parametrized, "model.layers.0.mlp.up_proj is parametrized"),
    "offloaded": (_offloaded, r".* is not in memory \(device meta\).*; load it without device_map"),
    "dispatched": (_dispatched, "accelerate moves its layers between devices"),
    "without weights": (lambda model: model.to("meta"), r".* is not in memory \(device meta\)"),
    "without a head": (lambda model: LlamaModel(model.config), "LlamaModel has no language-model head"),
    "a classifier": (
        lambda model: LlamaForSequenceClassification(model.config),
        "LlamaForSequenceClassification has no language-model head",
    ),
    "an unknown family": (
        lambda _: AutoModelForCausalLM.from_config(
            __import__("transformers").GPT2Config(n_layer=1, n_embd=8, n_head=1)
        ),
        "the family 'gpt2' is not supported",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind: str, tmp_path: Path) -> None:
    change, message = REFUSED[kind]
    with pytest.raises(ConfigurationError, match=f"^model: {message}"):
        quick(change(make(FAMILIES["llama"])), output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


EARLY: dict[str, tuple[dict[str, Any], str]] = {
    "scheme": ({"scheme": "w9a9"}, "scheme: there is no file w9a9"),
    "scheme of another type": ({"scheme": 4}, "scheme: 4 is no name"),
    "tokenizer": ({"tokenizer": "w4a16"}, "tokenizer: 'w4a16' is no tokenizer of transformers"),
    "settings": ({"settings": {"model.weigths.bits": 4}}, "settings: there is no setting model.weigths.bits"),
    "value": ({"settings": {"model.weights.bits": 1}}, "model.weights.bits: 1 is not a width"),
    "trainer": ({"settings": {"trainer.accelerator": "tpux"}}, "trainer.accelerator: tpux is not accepted"),
    "option of Lightning": ({"settings": {"trainer.max_steps": "a"}}, "settings: trainer.max_steps: a is not accepted"),
    "missing file": ({"calibration": "gone.npy"}, "calibration: there is no file 'gone.npy'"),
    "text by name": ({"calibration": "wikitext2"}, "calibration: 'wikitext2' is text, which needs a tokenizer"),
    "text of the preset": ({"calibration": None}, "data.dataset: 'builtin' is text, which needs a tokenizer"),
    "evaluation": (
        {"settings": {"data.evaluation": ["builtin"]}},
        "data.evaluation: 'builtin' is text, which needs a tokenizer",
    ),
    "calibration": ({"calibration": [[1, 2], None]}, "calibration: row 1 is None"),
    "positions": ({"settings": {"data.sequence_length": 33}}, "data.sequence_length: 33 is more than the 32 positions"),
    "output of another type": ({"output": 4}, "output: 4 is no path"),
    "calibration twice": ({"settings": {"data.dataset": "c4"}}, "settings: data.dataset: calibration is given as well"),
}


@pytest.mark.parametrize("kind", EARLY)
def test_arguments_are_checked_before_the_model_is_saved(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, message = EARLY[kind]
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", lambda *_, **__: pytest.fail("it is saved"))
    with pytest.raises(ConfigurationError, match=f"^{message}") as caught:
        quick(make(FAMILIES["llama"]), **{"output": tmp_path / "run", **arguments})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_an_output_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match=rf"^output: {tmp_path / 'file'} is a file, not a folder"):
        quick(make(FAMILIES["llama"]), output=tmp_path / "file" / "run")


def test_a_processor_has_a_tokenizer(tokenizer: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"^tokenizer: a _Processor is a processor; .*processor\.tokenizer"):
        quick(make(FAMILIES["llama"]), tokenizer=_Processor(tokenizer))
