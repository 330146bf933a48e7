"""Folders that are damaged or lie are refused before anything is computed, by the file and the tensor."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from omniquant_pl.errors import ConfigurationError
from omniquant_pl.export.packed import PackedExport
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.run.folder import RunFolder
from omniquant_pl.runtime import load_packed
from omniquant_pl.spec import ActivationSpec, WeightSpec

Damage = Callable[[Path], object]
FILE = "model.safetensors"
UP, NORM = "model.layers.1.mlp.up_proj", "model.layers.0.input_layernorm.weight"


@pytest.fixture(scope="session")
def packed(
    make_llama: Callable[..., Path],
    finish: Callable[[OmniQuantModel], RunFolder],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    model = OmniQuantModel(str(make_llama(attention_bias=True)), WeightSpec(4, 16), ActivationSpec(8))
    folder = tmp_path_factory.mktemp("export") / "packed"
    PackedExport().write(model, finish(model), folder)
    return folder


def config(**changes: Any) -> Damage:
    """Other values in config.json; a section is merged."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        for key, value in changes.items():
            content[key] = content.get(key, {}) | value if isinstance(value, dict) else value
        (folder / "config.json").write_text(json.dumps(content))

    return damage


def scheme(**changes: Any) -> Damage:
    return config(quantization_config=changes)


def text(name: str, content: str) -> Damage:
    return lambda folder: (folder / name).write_text(content)


def content(make: Callable[[bytes], bytes]) -> Damage:
    """Another safetensors file, made of the bytes of the right one."""
    return lambda folder: (folder / FILE).write_bytes(make((folder / FILE).read_bytes()))


def header(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Another header before the same bytes of tensors."""

    def make(whole: bytes) -> bytes:
        end = 8 + struct.unpack("<Q", whole[:8])[0]
        parsed = json.loads(whole[8:end])
        change(parsed)
        changed = json.dumps(parsed).encode()
        return struct.pack("<Q", len(changed)) + changed + whole[end:]

    return content(make)


def entry(name: str, **changes: Any) -> Damage:
    return header(lambda parsed: parsed[name].update(changes))


def tensors(change: Callable[[dict[str, Tensor]], Mapping[str, Tensor] | None]) -> Damage:
    """Other tensors; those that are returned are added, or take the place of others."""

    def damage(folder: Path) -> None:
        found = load_file(folder / FILE)
        found |= change(found) or {}
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, folder / FILE)

    return damage


def without(name: str) -> Damage:
    return tensors(lambda found: {} if found.pop(name) is not None else None)


def filled(name: str, value: float) -> Damage:
    """One value of a tensor is another."""

    def change(found: dict[str, Tensor]) -> None:
        found[name].view(-1)[3] = value

    return tensors(change)


def shards(weight_map: Callable[[dict[str, str]], object]) -> Damage:
    """Two files and an index, which is changed."""

    def damage(folder: Path) -> None:
        names = sorted(found := load_file(folder / FILE))
        half = len(names) // 2
        for file, part in (("a.safetensors", names[:half]), ("b.safetensors", names[half:])):
            save_file({name: found[name] for name in part}, folder / file)
        (folder / FILE).unlink()
        index = {name: "a.safetensors" if name in names[:half] else "b.safetensors" for name in names}
        changed = weight_map(index) or index
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": changed}))

    return damage


def shard_without(name: str) -> Damage:
    """Two files and an index that names a tensor which neither has."""

    def damage(folder: Path) -> None:
        shards(lambda index: None)(folder)
        found = load_file(folder / "b.safetensors")
        del found[name]
        save_file(found, folder / "b.safetensors")

    return damage


def index_alone(content: str) -> Damage:
    """An index of that content, and no file of all tensors."""

    def damage(folder: Path) -> None:
        (folder / FILE).unlink()
        (folder / "model.safetensors.index.json").write_text(content)

    return damage


MALFORMED: dict[str, tuple[Damage, str]] = {
    # config.json
    "no-config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "config-is-a-folder": (lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()), "config.json"),
    "config-cut-off": (text("config.json", '{"model_type": "lla'), "config.json is not that of a packed model"),
    "config-is-a-list": (text("config.json", "[1, 2]"), "config.json is not that of a packed model"),
    "config-nested-without-end": (text("config.json", "[" * 100_000), "config.json is not that of a packed model"),
    "config-not-utf8": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe{}"), "config.json is not that of"),
    "not-quantized": (config(quantization_config=None), "quantization_config is None, not a mapping"),
    "another-method": (scheme(quant_method="awq"), "quant_method is 'awq', not 'omniquant'"),
    "unknown-version": (scheme(version=2), "version is 2; this program reads 1"),
    "bits-of-no-scheme": (scheme(bits=16), "model.weights.bits: 16"),
    "unknown-family": (config(model_type="nothing"), "do not fit: the family 'nothing' is unknown"),
    "unregistered-family": (config(model_type="gpt2"), "do not fit: the family 'gpt2' is not supported"),
    "no-family": (config(model_type=None), "do not fit: the family None is unknown"),
    "no-heads": (config(num_attention_heads=0), "config.json and the tensors do not fit"),
    "negative-size": (config(intermediate_size=-48), "config.json and the tensors do not fit"),
    "size-is-text": (config(hidden_size="32"), "config.json and the tensors do not fit"),
    "layers-without-end": (config(num_hidden_layers=10**12), "num_hidden_layers is 1000000000000, but"),
    "vocabulary-without-end": (config(vocab_size=10**15), "vocab_size is 1000000000000000, but"),
    "heads-without-end": (config(num_attention_heads=10**9), "num_attention_heads is 1000000000, but"),
    "head-without-end": (config(head_dim=10**13), "head_dim is 10000000000000, but"),
    # config.json against tensors
    "more-layers": (config(num_hidden_layers=3), "there is no tensor model.layers.2."),
    "another-width": (config(intermediate_size=64), r"model.safetensors: .*\.packed has shape"),
    "another-vocabulary": (config(vocab_size=65), "model.safetensors: model.embed_tokens.weight has shape"),
    "no-biases": (config(attention_bias=False, num_key_value_heads=2), r"k_proj\.packed has shape"),
    "other-bits": (scheme(bits=3), r"q_proj\.packed has shape \(32, 4\), not \(32, 3\)"),
    "other-bits-of-a-linear": (scheme(bits_of={"up_proj": 8}), r"up_proj\.packed has shape \(48, 4\), not \(48, 8\)"),
    "another-group-size": (scheme(group_size=32), r"q_proj\.scale has shape \(32, 2\), not \(32, 1\)"),
    "groups-per-channel": (scheme(group_size=None), r"q_proj\.scale has shape \(32, 2\), not \(32, 1\)"),
    "zero-points-of-symmetric": (scheme(symmetric=True), r"zero_point belongs to no quantized linear"),
    "another-scale": (scheme(scale_dtype="float32"), r"q_proj\.scale is stored as F16, not as F32"),
    # the file
    "no-tensors": (lambda folder: (folder / FILE).unlink(), "holds neither model.safetensors nor"),
    "empty-file": (content(lambda whole: b""), "model.safetensors cannot be read"),
    "cut-in-the-header": (content(lambda whole: whole[:100]), "model.safetensors cannot be read"),
    "cut-in-a-tensor": (content(lambda whole: whole[:-10]), "model.safetensors cannot be read"),
    "bytes-too-many": (content(lambda whole: whole + b"more"), "model.safetensors cannot be read"),
    "header-without-end": (content(lambda whole: b"\xff" * 8 + whole[8:]), "model.safetensors cannot be read"),
    "header-is-noise": (content(lambda w: w[:8] + b"\x81" * (len(w) - 8)), "model.safetensors cannot be read"),
    "negative-dimension": (entry(f"{UP}.packed", shape=[-48, 4]), "model.safetensors cannot be read"),
    "huge-dimension": (entry(f"{UP}.packed", shape=[2**40, 4]), "model.safetensors cannot be read"),
    "overflowing-shape": (entry(f"{UP}.packed", shape=[2**63, 2**63]), "model.safetensors cannot be read"),
    "dimension-beyond-64-bit": (entry(f"{UP}.packed", shape=[2**70, 1]), "model.safetensors cannot be read"),
    "pad-token-beyond": (config(pad_token_id=64), "do not fit: Padding_idx must be within num_embeddings"),
    "unknown-dtype": (entry(f"{UP}.packed", dtype="I128"), "model.safetensors cannot be read"),
    "overlapping-tensors": (entry(f"{UP}.packed", data_offsets=[0, 768]), "model.safetensors cannot be read"),
    "offsets-beyond-the-file": (entry(f"{UP}.packed", data_offsets=[0, 2**60]), "model.safetensors cannot be read"),
    "offsets-backwards": (entry(f"{UP}.packed", data_offsets=[768, 0]), "model.safetensors cannot be read"),
    # shards
    "index-cut-off": (index_alone('{"weight_map": {"a"'), "is not an index of shards"),
    "index-is-a-list": (index_alone('{"weight_map": [1]}'), "is not an index of shards"),
    "shard-missing": (shards(lambda index: index | {f"{UP}.scale": "c.safetensors"}), "names c.safetensors, which"),
    "shard-elsewhere": (shards(lambda i: i | {f"{UP}.scale": "../b.safetensors"}), "'../b.safetensors', which is no"),
    "shard-is-a-number": (shards(lambda index: index | {f"{UP}.scale": 7}), "names 7, which is no file"),
    "shard-lacks-a-tensor": (shard_without(f"{UP}.scale"), rf"b\.safetensors has no tensor {UP}\.scale"),
    # tensors
    "no-codes": (without(f"{UP}.packed"), rf"there is no tensor {UP}\.packed"),
    "no-scales": (without(f"{UP}.scale"), rf"there is no tensor {UP}\.scale"),
    "no-zero-points": (without(f"{UP}.zero_point"), rf"there is no tensor {UP}\.zero_point"),
    "no-norm": (without(NORM), f"there is no tensor {NORM}"),
    "no-bias": (
        without("model.layers.0.self_attn.q_proj.bias"),
        r"there is no tensor model\.layers\.0\.self_attn\.q_proj\.bias",
    ),
    "no-embedding": (without("model.embed_tokens.weight"), "there is no tensor model.embed_tokens.weight"),
    "codes-of-nothing": (
        tensors(lambda found: {"model.layers.7.mlp.up_proj.packed": found[f"{UP}.packed"].clone()}),
        r"model\.layers\.7\.mlp\.up_proj\.packed belongs to no quantized linear",
    ),
    "codes-too-short": (tensors(lambda f: {f"{UP}.packed": f[f"{UP}.packed"][:, :3]}), r"packed has shape \(48, 3\)"),
    "codes-transposed": (tensors(lambda f: {f"{UP}.packed": f[f"{UP}.packed"].T}), r"packed has shape \(4, 48\)"),
    "codes-of-64-bit": (tensors(lambda f: {f"{UP}.packed": f[f"{UP}.packed"].long()}), "packed is stored as I64"),
    "codes-are-floats": (tensors(lambda f: {f"{UP}.packed": f[f"{UP}.packed"].float()}), "packed is stored as F32"),
    "zero-points-too-few": (tensors(lambda f: {f"{UP}.zero_point": f[f"{UP}.zero_point"][1:]}), "zero_point has shape"),
    "zero-points-unpacked": (
        tensors(lambda f: {f"{UP}.zero_point": torch.zeros(48, 2, dtype=torch.uint8)}),
        "zero_point has shape",
    ),
    "zero-points-are-floats": (
        tensors(lambda f: {f"{UP}.zero_point": f[f"{UP}.zero_point"].float()}),
        "zero_point is stored as F32, not as I32",
    ),
    "scale-is-nan": (filled(f"{UP}.scale", float("nan")), rf"{FILE}: {UP}\.scale has 1 values that are NaN"),
    "scale-is-infinite": (filled(f"{UP}.scale", float("inf")), rf"{FILE}: {UP}\.scale has 1 values that are NaN"),
    "scale-is-zero": (filled(f"{UP}.scale", 0.0), rf"{FILE}: {UP}\.scale has 1 scales that are not above 0"),
    "scale-is-negative": (filled(f"{UP}.scale", -0.5), rf"{FILE}: {UP}\.scale has 1 scales that are not above 0"),
    "norm-is-nan": (filled(NORM, float("nan")), f"{FILE}: {NORM} has 1 values that are NaN or infinite"),
    "norm-too-long": (tensors(lambda found: {NORM: torch.ones(33)}), rf"{NORM} has shape \(33,\), not \(32,\)"),
    "norm-is-whole-numbers": (tensors(lambda f: {NORM: torch.ones(32).int()}), f"{NORM} is stored as I32, not as a"),
    "head-of-8-bit": (
        tensors(lambda found: {"lm_head.weight": found["lm_head.weight"].to(torch.float8_e4m3fn)}),
        "lm_head.weight is stored as F8_E4M3, not as a float",
    ),
    # what comes along
    "generation-config-cut-off": (text("generation_config.json", "{"), "generation_config.json is damaged"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_is_refused(packed: Path, tmp_path: Path, case: str) -> None:
    damage, expected = MALFORMED[case]
    folder = Path(shutil.copytree(packed, tmp_path / "packed"))
    damage(folder)
    with pytest.raises(ConfigurationError, match=rf"^packed: .*{expected}") as caught:
        load_packed(folder)
    assert str(folder) in str(caught.value)


def test_as_it_is_it_loads(packed: Path, tokens: Tensor) -> None:
    """Or the cases above would prove nothing."""
    assert bool(torch.isfinite(load_packed(packed)(tokens).logits).all())


def test_damaged_bytes_of_codes_are_other_codes(packed: Path, tmp_path: Path, tokens: Tensor) -> None:
    """Every code is valid: what cannot be noticed must not be harmful either."""
    folder = Path(shutil.copytree(packed, tmp_path / "packed"))
    tensors(lambda found: {f"{UP}.packed": torch.full_like(found[f"{UP}.packed"], -1)})(folder)
    assert bool(torch.isfinite(load_packed(folder)(tokens).logits).all())


def test_a_folder_that_is_not_there() -> None:
    with pytest.raises(
        ConfigurationError, match=r"^packed: there is no packed model in nowhere; .*: export --format packed"
    ):
        load_packed("nowhere")


@pytest.mark.parametrize("device", ["abacus", "cuda:77"])
def test_a_device_that_is_not_there(packed: Path, device: str) -> None:
    with pytest.raises(ConfigurationError, match=f"device: {device} is not a device of this machine"):
        load_packed(packed, device=device)


SHARDS: dict[str, Damage] = {
    "as-they-should-be": shards(lambda index: None),
    "tensor-in-the-other-shard": shards(lambda index: index | {f"{UP}.scale": "a.safetensors"}),
    "index-lacks-a-tensor": shards(lambda index: index.pop(f"{UP}.scale") and None),
}


@pytest.mark.parametrize("case", SHARDS)
def test_shards_load(packed: Path, tmp_path: Path, tokens: Tensor, case: str) -> None:
    """What is in them counts, as in transformers, not what the index says of it."""
    folder = Path(shutil.copytree(packed, tmp_path / "packed"))
    SHARDS[case](folder)
    assert torch.equal(load_packed(folder)(tokens).logits, load_packed(packed)(tokens).logits)


def test_only_headers_are_read_of_a_folder_that_does_not_fit(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(packed, tmp_path / "packed"))
    scheme(bits=3)(folder)
    monkeypatch.setattr("omniquant_pl.checkpoint.Checkpoint.read", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(ConfigurationError, match="has shape"):
        load_packed(folder)
