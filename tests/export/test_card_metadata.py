"""What the hub reads of a card, as its own client reads it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from omniquant_pl.export.card import model_card
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.run.folder import RunFolder
from omniquant_pl.spec import WeightSpec

METRICS = {
    "perplexity": {
        "wikitext2": {"full_precision": 5.0, "quantized": 5.5},
        "own": {"full_precision": 7.0, "quantized": None},
    },
    "zero_shot": {
        "piqa": {
            "full_precision": {"acc": 0.8, "acc_stderr": 0.01},
            "quantized": {"acc": 0.75, "acc_stderr": 0.02},
        },
        "boolq": {"exported": {"acc": 0.6}},
    },
}


def card_of(model: Path, run: Path, metrics: dict[str, Any] | None = None, name: str | None = None) -> ModelCard:
    settings = OmniQuantModel(str(model), WeightSpec(3, 16))
    settings.source  # noqa: B018 (opened under its own path)
    if name is not None:
        settings.path = name
    folder = RunFolder(run)
    folder.write_metrics(metrics or {})
    return ModelCard(model_card(settings, folder, "How it is stored."))


def test_results(llama: Path, tmp_path: Path) -> None:
    card = card_of(llama, tmp_path, METRICS)
    found = [(r.dataset_type, r.dataset_name, r.metric_type, r.metric_value) for r in card.data.eval_results]
    assert found == [
        ("Salesforce/wikitext", "wikitext2", "perplexity", 5.5),
        ("piqa", "piqa", "acc", 0.75),
    ]
    assert "| piqa, acc | 0.8000 ± 0.0100 | 0.7500 ± 0.0200 |" in card.text


def test_a_run_that_was_not_measured(llama: Path, tmp_path: Path) -> None:
    card = card_of(llama, tmp_path)
    assert card.data.eval_results is None
    assert card.data.tags == ["omniquant", "quantized", "3-bit", "w3a16g16"]
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert "zero-shot" not in card.text


def test_base_model_of_the_hub(llama: Path, tmp_path: Path) -> None:
    card = card_of(llama, tmp_path, name="owner/base")
    assert (card.data.base_model, card.data.base_model_relation) == ("owner/base", "quantized")


@pytest.mark.parametrize(
    ("head", "license_"),
    [
        ("---\nlicense: llama2\nlanguage: en\nmodel_name: other\n---\n# Base\n", "llama2"),
        ("# No metadata\n---\nlicense: mit\n---\n", None),
        ("---\n: [\n---\n", None),
        ("", None),
    ],
)
def test_licence_of_the_original(llama: Path, tmp_path: Path, head: str, license_: str | None) -> None:
    shutil.copytree(llama, tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text(head)
    card = card_of(tmp_path / "base", tmp_path)
    assert card.data.license == license_
    assert card.data.model_name is None or "other" not in card.data.model_name


@pytest.mark.parametrize(
    "word", ["no", "on", "yes", "off", "y", "1.0", "0x10", "1_000", "2024-01-01", "12:30:00", "=", "<<"]
)
def test_words_that_yaml_takes_for_something_else(llama: Path, tmp_path: Path, word: str) -> None:
    """Norwegian is no truth value, and a licence's name no number: YAML 1.1, which PyYAML reads, has more of them."""
    shutil.copytree(llama, tmp_path / "base")
    head = f"---\nlicense: other\nlicense_name: {word}\nlanguage:\n- {word}\n- en\n---\n"
    (tmp_path / "base" / "README.md").write_text(head)
    card = card_of(tmp_path / "base", tmp_path, {"perplexity": {word: {"quantized": 5.5}}}, name=f"owner/{word}")
    assert (card.data.language, card.data.license_name, card.data.license) == ([word, "en"], word, "other")
    assert [(result.dataset_name, result.metric_value) for result in card.data.eval_results] == [(word, 5.5)]
    assert card.data.base_model == f"owner/{word}"


@pytest.mark.parametrize(
    "head",
    [
        "\ufeff---\nlicense: mit\n---\n",
        "---\r\nlicense: mit\r\n---\r\n# Base",
        "---\nlicense: mit\n---",
        "\n---\nlicense: mit\n---  \n",
    ],
    ids=["byte-order mark", "line ends of Windows", "nothing else", "spaces"],
)
def test_metadata_as_the_hub_finds_it(llama: Path, tmp_path: Path, head: str) -> None:
    shutil.copytree(llama, tmp_path / "base")
    (tmp_path / "base" / "README.md").write_bytes(head.encode())
    assert card_of(tmp_path / "base", tmp_path).data.license == "mit"


@pytest.mark.parametrize("nothing", ["", "null", "~", "[]"])
def test_keys_without_a_value_are_left_out(llama: Path, tmp_path: Path, nothing: str) -> None:
    shutil.copytree(llama, tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text(f"---\nlicense: {nothing}\nlanguage: {nothing}\n---\n")
    card = card_of(tmp_path / "base", tmp_path)
    assert (card.data.license, card.data.language) == (None, None)
