"""The packed folder, against the reader in docs/packed-format.md and against the dequantized folder."""

from __future__ import annotations

import json
import math
import re
import runpy
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from omniquant_pl.export import FORMATS, HfExport, Verification
from omniquant_pl.export.packed import PackedExport
from omniquant_pl.export.verification import calibrated_logits
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.run.folder import RunFolder
from omniquant_pl.runtime import load_packed
from omniquant_pl.spec import ActivationSpec, TransformSpec, WeightSpec
from omniquant_pl.trainer import SequentialTrainer

PAGE = (Path(__file__).parents[2] / "docs" / "packed-format.md").read_text(encoding="utf-8")
Finish = Callable[[OmniQuantModel], RunFolder]
SPECS = {
    "w2": WeightSpec(2),
    "w3g16": WeightSpec(3, 16),
    "w4g20": WeightSpec(4, 20),
    "w4sym": WeightSpec(4, symmetric=True),
    "w5sym-g7": WeightSpec(5, 7, symmetric=True),
    "w6-bfloat16": WeightSpec(6, 32, scale_dtype="bfloat16"),
    "w7-float32": WeightSpec(7, scale_dtype="float32"),
    "w8": WeightSpec(8),
    "w2-mixed": WeightSpec(2, 16, bits_of={"down_proj": 5, "v_proj": 8}),
}


@pytest.fixture(scope="module")
def read_weights(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, dict[str, int]], dict[str, Tensor]]:
    """The reader that the page shows, which uses nothing of the package."""
    code = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)[1]
    assert "omniquant" not in code
    file = tmp_path_factory.mktemp("page") / "reader.py"
    file.write_text(code)
    return runpy.run_path(str(file))["read_weights"]


@pytest.mark.parametrize(("spec", "intermediate"), zip(SPECS, cycle([48, 64])))
def test_weights_are_those_of_the_dequantized_folder(
    make_llama: Callable[..., Path],
    finish: Finish,
    read_weights: Callable[[Path, dict[str, int]], dict[str, Tensor]],
    tmp_path: Path,
    spec: str,
    intermediate: int,
) -> None:
    model = OmniQuantModel(str(make_llama(intermediate_size=intermediate)), SPECS[spec])
    run = finish(model)
    PackedExport().write(model, run, tmp_path / "packed")
    HfExport().write(model, run, tmp_path / "hf")
    dense = load_file(tmp_path / "hf" / "model.safetensors")
    linears = {name.removesuffix(".weight"): tensor for name, tensor in dense.items() if "_proj" in name}
    weights = read_weights(tmp_path / "packed", {name: tensor.shape[1] for name, tensor in linears.items()})
    assert len(weights) == 14
    for name, tensor in linears.items():
        assert torch.equal(weights[name], tensor), name
    packed = load_file(tmp_path / "packed" / "model.safetensors")
    for name in dense.keys() - {f"{linear}.weight" for linear in linears}:
        assert torch.equal(packed[name].float(), dense[name]), name


@pytest.mark.parametrize(
    ("bits", "activations"),
    [*((bits, None) for bits in range(2, 9)), (4, ActivationSpec(4)), (7, ActivationSpec(6, symmetric=True))],
)
def test_logits_of_a_calibrated_model(
    llama: Path,
    fit: Callable[..., SequentialTrainer],
    tokens: Tensor,
    tmp_path: Path,
    bits: int,
    activations: ActivationSpec | None,
) -> None:
    model = OmniQuantModel(str(llama), WeightSpec(bits, 16), activations, transform=TransformSpec(mlp=True))
    run = fit(model, max_epochs=1).run_folder
    assert PackedExport().refusal(model) is None
    PackedExport().write(model, run, tmp_path / "packed")
    (result,) = Verification(PackedExport(), tokens).run(model, run, tmp_path / "packed")
    assert result.client.name == "omniquant-pl"
    assert result.error is not None
    assert result.error <= 1e-5
    # It does quantize activations, or the logits above would be far from these.
    plain = calibrated_logits(model, run, tokens, quantizes_activations=False)
    apart = (plain - calibrated_logits(model, run, tokens, quantizes_activations=True)).norm() / plain.norm()
    assert bool(apart > 1e-2) == (activations is not None)


def test_in_memory_is_the_folder(
    make_llama: Callable[..., Path], finish: Finish, tokens: Tensor, tmp_path: Path
) -> None:
    folder = make_llama(tie_word_embeddings=True, attention_bias=True)
    model = OmniQuantModel(str(folder), WeightSpec(3, 20), ActivationSpec(8))
    run = finish(model)
    PackedExport().write(model, run, tmp_path / "packed")
    whole, written = PackedExport().in_memory(model, run), load_packed(tmp_path / "packed")
    assert torch.equal(whole(tokens).logits, written(tokens).logits)
    assert whole.generation_config.to_dict() == written.generation_config.to_dict()
    assert {name: t.dtype for name, t in whole.named_buffers()} == {
        name: t.dtype for name, t in written.named_buffers()
    }


def test_configuration(llama: Path, finish: Finish, tmp_path: Path) -> None:
    model = OmniQuantModel(str(llama), WeightSpec(3, 16, bits_of={"down_proj": 4}), ActivationSpec(6))
    PackedExport().write(model, finish(model), tmp_path / "packed")
    before = json.loads((llama / "config.json").read_text())
    after = json.loads((tmp_path / "packed" / "config.json").read_text())
    described = after.pop("quantization_config")
    assert after == before
    assert described == {
        "quant_method": "omniquant",
        "version": 1,
        "bits": 3,
        "group_size": 16,
        "symmetric": False,
        "scale_dtype": "float16",
        "bits_of": {"down_proj": 4},
        "activations": {"bits": 6, "symmetric": False},
    }
    keys = re.findall(r"^\| `(\w+)` \|", PAGE.split("### `quantization_config`")[1].split("\n### ")[0], re.MULTILINE)
    assert keys == list(described)


def test_shards_and_dtype(llama: Path, finish: Finish, tokens: Tensor, tmp_path: Path) -> None:
    model = OmniQuantModel(str(llama), WeightSpec(4, 16))
    run = finish(model)
    PackedExport().write(model, run, tmp_path / "whole")
    PackedExport("bfloat16", shard_bytes=8_000).write(model, run, tmp_path / "parts")
    files = sorted((tmp_path / "parts").glob("*.safetensors"))
    assert len(files) > 2
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    assert found.keys() == whole.keys()
    for name, tensor in whole.items():
        is_part = name.rpartition(".")[2] in ("packed", "scale", "zero_point")
        assert torch.equal(found[name], tensor if is_part else tensor.to(torch.bfloat16)), name
    difference = load_packed(tmp_path / "parts")(tokens).logits - load_packed(tmp_path / "whole")(tokens).logits
    assert 0 < difference.abs().max() < 0.1


@pytest.mark.parametrize(("bits", "group_size"), [(2, 64), (3, None), (4, 128), (8, 32)])
def test_files_are_as_small_as_the_codes(finish: Finish, tmp_path: Path, bits: int, group_size: int | None) -> None:
    """Headers included: codes, a float16 scale and a zero point a group, and what is not quantized as it is."""
    model = OmniQuantModel("tiny-llama", WeightSpec(bits, group_size))
    PackedExport().write(model, finish(model), tmp_path / "packed")
    files = list((tmp_path / "packed").glob("*.safetensors"))
    stored = {name: tensor for file in files for name, tensor in load_file(file).items()}
    needed = 0.0
    for name, tensor in load_file(model.source.folder / "model.safetensors").items():
        if re.search(r"layers\.\d+\..*_proj\.weight$", name):
            groups = len(tensor) * math.ceil(tensor.shape[1] / (group_size or tensor.shape[1]))
            needed += (tensor.numel() * bits + groups * (16 + bits)) / 8
        else:
            assert stored[name].nbytes <= tensor.numel() * 4
            needed += stored[name].nbytes
    assert needed <= sum(file.stat().st_size for file in files) <= 1.03 * needed


def test_it_is_registered() -> None:
    assert FORMATS["packed"] is PackedExport


@pytest.mark.slow
@pytest.mark.reference
@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("tiny-llama", "w2g64"),
        ("llama", "w3"),
        ("llama-outliers", "w4g128"),
        ("llama-outliers", "w4a4"),
        ("opt-outliers", "w8"),
        ("opt-outliers", "w6a6"),
    ],
)
def test_trained_models(reference: Path, finish: Finish, tmp_path: Path, name: str, scheme: str) -> None:
    """Equal logits, and the text that transformers generates with the dequantized folder."""
    match = re.fullmatch(r"w(\d)(?:a(\d))?(?:g(\d+))?", scheme)
    assert match is not None
    bits, activations, size = (None if part is None else int(part) for part in match.groups())
    path = name if name == "tiny-llama" else str(reference / "models" / name)
    weights = WeightSpec(bits or 0, size)
    model = OmniQuantModel(path, weights, None if activations is None else ActivationSpec(activations))
    run = finish(model)
    PackedExport().write(model, run, tmp_path / "packed")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "packed")
    tokens = tokenizer("The first line of a file says what it is, and the others say how.", return_tensors="pt")
    expected = calibrated_logits(model, run, tokens["input_ids"], quantizes_activations=True)
    with torch.no_grad():
        logits = load_packed(tmp_path / "packed")(**tokens).logits
    errors = (logits - expected).norm(dim=-1) / expected.norm(dim=-1)
    if activations is None:
        assert float(errors.max()) <= 1e-4
        assert texts(model, run, tmp_path, tokens) == 1
    else:  # sums in another order may move an activation that is half-way between two codes
        assert float(errors.median()) <= 1e-4


def texts(model: OmniQuantModel, run: RunFolder, folder: Path, tokens: Any) -> int:
    """Number of different texts that the packed and the dequantized folder go on with."""
    from transformers import AutoModelForCausalLM

    HfExport().write(model, run, folder / "hf")
    plain = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32).eval()
    options = {"max_new_tokens": 48, "do_sample": False, "pad_token_id": 0}
    return len({tuple(n.generate(**tokens, **options)[0].tolist()) for n in (plain, load_packed(folder / "packed"))})
