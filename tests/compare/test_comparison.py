"""What is run, what is kept, and what a row says that could not be run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from omniquant_pl.compare import comparison
from omniquant_pl.compare.backend_method import BackendMethod
from omniquant_pl.compare.backends import BACKENDS
from omniquant_pl.compare.comparison import Comparison
from omniquant_pl.compare.method import Method, MethodInputs
from omniquant_pl.compare.row import Row
from omniquant_pl.errors import CalibrationError, ConfigurationError
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.spec import ActivationSpec, WeightSpec


class Recorder(Method):
    """Counts its runs; fails or refuses if it is told to."""

    def __init__(self, name: str) -> None:
        self.name, self.title, self.note = name, name.upper(), ""
        self.runs = 0
        self.setting = 0
        self.failure: str | None = None
        self.reason: str | None = None
        self.found: list[str] = []

    def refusal(self, bench: MethodInputs) -> str | None:
        return self.reason

    def decides(self, bench: MethodInputs) -> Mapping[str, Any]:
        return {"setting": self.setting}

    def measure(self, bench: MethodInputs, folder: Path) -> Row:
        self.runs += 1
        self.found = sorted(path.name for path in folder.iterdir())
        (folder / "half").touch()
        if self.failure is not None:
            raise CalibrationError(self.failure)
        return Row(self.name, self.title, {"set": float(self.runs)}, 3.0, 10, 1.0, {"host": 5})


@pytest.fixture
def contenders(monkeypatch: pytest.MonkeyPatch) -> dict[str, Recorder]:
    full, *others = [Recorder(name) for name in ("full_precision", "one", "two")]
    stand_in = type("StandIn", (), {"name": full.name, "__new__": lambda _: full})
    monkeypatch.setattr(comparison, "FullPrecision", stand_in)
    monkeypatch.setattr(comparison, "_contenders", lambda: {entry.name: entry for entry in others})
    return {entry.name: entry for entry in (full, *others)}


@pytest.fixture
def bench(llama: Path, tokens: Tensor) -> MethodInputs:
    config = {"model": {"weights": {"bits": 3}}, "data": {"dataset": "some.npy"}}
    return MethodInputs(config, OmniQuantModel(str(llama), WeightSpec(3, 16)), tokens, {"set": tokens}, "cpu")


def counts(contenders: Mapping[str, Recorder]) -> list[int]:
    return [entry.runs for entry in contenders.values()]


def test_finished_methods_are_kept(contenders: dict[str, Recorder], bench: MethodInputs, tmp_path: Path) -> None:
    rows = Comparison(bench, tmp_path).run()
    assert [row.method for row in rows] == ["full_precision", "one", "two"]
    assert Comparison(bench, tmp_path).run() == rows
    assert counts(contenders) == [1, 1, 1]
    content = json.loads((tmp_path / "compare.json").read_text())
    assert [row["perplexity"] for row in content["rows"]] == [{"set": 1.0}] * 3
    assert content["scheme"] == "w3a16g16"
    assert "| ONE | 1.00 | 3.00 |" in (tmp_path / "compare.md").read_text()


def test_other_tokens_are_measured_again(contenders: dict[str, Recorder], bench: MethodInputs, tmp_path: Path) -> None:
    Comparison(bench, tmp_path).run(["one"])
    Comparison(replace(bench, calibration=bench.calibration.flip(0)), tmp_path).run(["one"])
    assert contenders["one"].runs == 2
    Comparison(replace(bench, evaluation={"set": torch.zeros(1, 4)}), tmp_path).run(["one"])
    assert contenders["one"].runs == 3


def test_what_still_holds_stays_in_the_file(
    contenders: dict[str, Recorder], bench: MethodInputs, tmp_path: Path
) -> None:
    def methods_in_the_file() -> list[str]:
        return [row["method"] for row in json.loads((tmp_path / "compare.json").read_text())["rows"]]

    Comparison(bench, tmp_path).run()
    assert len(Comparison(bench, tmp_path).run(["two"])) == 2
    assert methods_in_the_file() == ["full_precision", "one", "two"]
    contenders["one"].setting = 1
    Comparison(bench, tmp_path).run(["two"])
    assert methods_in_the_file() == ["full_precision", "two"]
    assert counts(contenders) == [1, 1, 1]


def test_an_interrupted_method_finds_what_it_left(
    contenders: dict[str, Recorder], bench: MethodInputs, tmp_path: Path
) -> None:
    one = contenders["one"]
    one.failure = "ended by SIGKILL"
    (_, row) = Comparison(bench, tmp_path).run(["one"])
    assert (row.note, row.perplexity) == ("failed: ended by SIGKILL", {})
    one.failure = None
    (_, row) = Comparison(bench, tmp_path).run(["one"])
    assert one.found == ["fingerprint", "half"]
    assert row.perplexity == {"set": 2.0}
    one.setting = 5
    Comparison(bench, tmp_path).run(["one"])
    assert one.found == ["fingerprint"]


def test_a_method_that_cannot_says_so(contenders: dict[str, Recorder], bench: MethodInputs, tmp_path: Path) -> None:
    contenders["two"].reason = "it is made for weights alone"
    rows = Comparison(bench, tmp_path).run()
    assert [row.note for row in rows] == ["", "", "it is made for weights alone"]
    assert contenders["two"].runs == 0
    assert "| TWO |  |  |  |  |  | it is made for weights alone |" in (tmp_path / "compare.md").read_text()


def test_a_damaged_file_counts_for_nothing(
    contenders: dict[str, Recorder], bench: MethodInputs, tmp_path: Path
) -> None:
    Comparison(bench, tmp_path).run()
    (tmp_path / "compare.json").write_text('{"rows": [')
    Comparison(bench, tmp_path).run()
    assert counts(contenders) == [2, 2, 2]


@pytest.mark.parametrize("methods", [[], ["one", "one"]])
def test_methods_that_make_no_rows_are_refused(
    contenders: dict[str, Recorder], bench: MethodInputs, tmp_path: Path, methods: list[str]
) -> None:
    with pytest.raises(ConfigurationError, match=r"methods: .* accepted: one, two"):
        Comparison(bench, tmp_path).run(methods)
    assert list(tmp_path.iterdir()) == []


class TestTool:
    @pytest.mark.parametrize(
        ("model", "reason"),
        [
            ({"activations": ActivationSpec(8)}, "it is asked for weights alone"),
            ({"weights": WeightSpec(4, symmetric=True)}, "it is asked for asymmetric codes of one width"),
            ({"weights": WeightSpec(4, bits_of={"down_proj": 3})}, "it is asked for asymmetric codes of one width"),
            ({"weights": WeightSpec(4)}, "not installed: pip install nothing-of-that-name"),
        ],
    )
    def test_refusals(self, llama: Path, bench: MethodInputs, model: dict[str, Any], reason: str) -> None:
        peer = replace(BACKENDS[0], package="nothing-of-that-name")
        assert BackendMethod(peer).refusal(replace(bench, model=OmniQuantModel(str(llama), **model))) == reason

    def test_a_plain_model_is_measured_as_every_other(
        self,
        llama: Path,
        bench: MethodInputs,
        tmp_path: Path,
        tokens: Tensor,
        logits_of: Callable[[Path, Tensor], Tensor],
    ) -> None:
        """A tool that changes nothing: its row has the perplexity of the model, by the formula."""
        program = tmp_path / "a_tool.py"
        program.write_text(
            "import shutil, sys\n"
            "given = dict(argument.removeprefix('--').split('=', 1) for argument in sys.argv[1:])\n"
            "assert (given['bits'], given['group-size'], given['method']) == ('3', '16', 'signround')\n"
            "shutil.copytree(given['model'], given['output'])\n"
        )
        peer = replace(BACKENDS[0], module="a_tool", package="torch")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
            row = BackendMethod(peer).measure(bench, tmp_path)
        logits = logits_of(llama, tokens).double()[:, :-1]
        chosen = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])
        assert row.perplexity["set"] == pytest.approx(float((-chosen.mean()).exp()), rel=1e-5)
        assert not (tmp_path / "model").exists()
        assert row.bits_per_weight == pytest.approx(3 + (16 + 3) / 16)
