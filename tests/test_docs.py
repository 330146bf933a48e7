"""What the pages in docs/ say is so: their code runs, their commands work, their tables are complete."""

from __future__ import annotations

import json
import re
import runpy
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from omniquant_pl import transform
from omniquant_pl.cli.program import run
from omniquant_pl.families import BlockLayout, Family, family_of, layout

ROOT = Path(__file__).parents[1]


def test_links_to_the_benchmarks_find_their_heading() -> None:
    """A page on the site, a folder where the repository is read: nothing else looks at them."""
    shown = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    headings = {re.sub(r"[^\w]+", "-", found.lower()) for found in re.findall(r"^#+ (.*)$", shown, re.MULTILINE)}
    pages = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md"))
    linked = set(re.findall(r"\]\(\.\./benchmarks/#([\w-]+)\)", pages))
    assert linked
    assert linked <= headings
    assert "(../benchmarks/README.md" not in pages


class TestAddingAFamily:
    PAGE = (ROOT / "docs" / "adding-a-family.md").read_text(encoding="utf-8")

    @pytest.fixture
    def code(self) -> list[str]:
        return re.findall(r"^```python\n(.*?)^```$", self.PAGE, re.MULTILINE | re.DOTALL)

    def test_the_registration_is_the_real_one(
        self, code: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = Qwen3Config(num_hidden_layers=2)
        real = family_of(config)
        monkeypatch.setattr(layout, "_FAMILIES", {})
        (tmp_path / "shown.py").write_text(code[1])
        runpy.run_path(str(tmp_path / "shown.py"))
        assert list(layout._FAMILIES) == ["qwen3"]
        shown = family_of(config)
        assert shown.block is not real.block
        assert [shown.block(config, i) for i in range(2)] == [real.block(config, i) for i in range(2)]
        others = [field.name for field in fields(Family) if field.name != "block"]
        assert [getattr(shown, name) for name in others] == [getattr(real, name) for name in others]

    @pytest.mark.parametrize(
        ("position", "path"),
        list(
            enumerate(
                ["omniquant_pl/families/llama.py", "omniquant_pl/families/qwen3.py", "tests/families/test_qwen3.py"]
            )
        ),
    )
    def test_code_is_in_the_file_it_names(self, code: list[str], position: int, path: str) -> None:
        assert f"`{path}`" in self.PAGE
        assert code[position] in (ROOT / path).read_text(encoding="utf-8")
        assert len(code) == 3

    @pytest.mark.parametrize("described", [Family, BlockLayout])
    def test_tables_have_every_field(self, described: Any) -> None:
        tables = self.PAGE.split("### Fields of ")[1:]
        table = tables[(Family, BlockLayout).index(described)].split("\n## ")[0]
        rows = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
        assert rows == [field.name for field in fields(described)]

    def test_table_has_every_pair(self) -> None:
        rows = re.findall(r"^\| `(\w+)\((.*?)\)` \|", self.PAGE, re.MULTILINE)
        declared = {name for name in transform.__all__ if hasattr(getattr(transform, name), "build")}
        assert {name for name, _ in rows} == declared
        for name, arguments in rows:
            names = [field.name for field in fields(getattr(transform, name))]
            assert names[: arguments.count(",") + 1] == arguments.split(", ")

    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """A tiny model of the family."""
        sizes = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 64, "head_dim": 16}
        counts = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        config = Qwen3Config(**sizes, **counts, max_position_embeddings=32, initializer_range=0.1)
        path = tmp_path_factory.mktemp("qwen3")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            Qwen3ForCausalLM(config).save_pretrained(path)
        return path

    @pytest.mark.parametrize("command", re.findall(r"^    python train.py (.*)$", PAGE, re.MULTILINE))
    def test_commands(
        self,
        command: str,
        folder: Path,
        token_files: tuple[Path, Path],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        assert "--model.path FOLDER" in command
        monkeypatch.chdir(tmp_path)
        calibration, evaluation = token_files
        data = f"--data.dataset {calibration} --data.samples 6 --data.evaluation [{evaluation}]"
        machine = "--trainer.accelerator cpu --trainer.default_root_dir run --progress.quiet true"
        quick = "" if "max_epochs" in command else "--trainer.max_epochs 1"
        run(shlex.split(f"{command.replace('FOLDER', str(folder))} {data} {machine} {quick}"))
        metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
        perplexity = metrics["perplexity"][evaluation.stem]
        if "--config w8a8.yaml" in command:
            assert perplexity["quantized"] == pytest.approx(perplexity["full_precision"], rel=0.02)
        else:
            assert metrics["scheme"] == "w4a4"
