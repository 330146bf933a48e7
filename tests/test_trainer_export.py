"""``export``: what is refused before any work, and how the result is verified."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from omniquant_pl.data import CalibrationData
from omniquant_pl.errors import CalibrationError, ConfigurationError
from omniquant_pl.export.hf import HfExport
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.run_folder import RunFolder
from omniquant_pl.spec import WeightSpec
from omniquant_pl.trainer import SequentialTrainer

Export = Callable[..., Path]


@pytest.fixture
def model(llama: Path) -> OmniQuantModel:
    return OmniQuantModel(str(llama), WeightSpec(5, 16))


@pytest.fixture
def trainer(model: OmniQuantModel, fit: Callable[..., SequentialTrainer]) -> SequentialTrainer:
    return fit(model, max_epochs=0)


@pytest.fixture
def export(
    model: OmniQuantModel, trainer: SequentialTrainer, token_files: tuple[Path, Path], tmp_path: Path
) -> Callable[..., Path]:
    """Exports the run to `out`."""

    def export(
        format_name: str, evaluation: Path = token_files[1], output: Path = tmp_path / "out", **settings: Any
    ) -> Path:
        data = CalibrationData(evaluation=[str(evaluation)])
        return trainer.export(model, data, format_name, str(output), **settings)

    return export


@pytest.mark.parametrize("format_name", ["hf", "packed"])
def test_verified(format_name: str, export: Export, capsys: pytest.CaptureFixture[str]) -> None:
    assert (export(format_name, verify=True) / "README.md").is_file()
    out = capsys.readouterr().out
    assert "relative error" in out
    assert "equal" in out
    assert "differs" not in out


def test_a_program_that_computes_something_else(
    export: Export, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Here one that finds other weights than were calibrated; the folder stays for who wants to look."""
    pack = HfExport.pack
    monkeypatch.setattr(HfExport, "pack", lambda *arguments: {k: v * 1.01 for k, v in pack(*arguments).items()})
    with pytest.raises(CalibrationError, match=r"^transformers computes other logits than the calibrated model"):
        export("hf", verify=True)
    assert "differs" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.safetensors").is_file()


class TestRefusedBeforeWork:
    @pytest.fixture
    def message(self, export: Export, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., str]:
        """The refusal of an export that is not to begin."""

        def message(format_name: str = "hf", **settings: Any) -> str:
            monkeypatch.setattr(OmniQuantModel, "folded", lambda *_: pytest.fail("a block was folded"))
            with pytest.raises(ConfigurationError) as caught:
                export(format_name, **settings)
            assert not (tmp_path / "out").exists()
            return str(caught.value)

        return message

    @pytest.mark.parametrize("format_name", ["gptq", "mlc"])
    def test_a_scheme_that_a_format_cannot_hold(self, format_name: str, message: Callable[..., str]) -> None:
        refusal = message(format_name)
        assert refusal.startswith(f"export.format: {format_name} cannot hold this model exactly: ")
        assert "formats that can: hf, packed, compressed-tensors" in refusal

    def test_a_run_that_has_not_finished(self, trainer: SequentialTrainer, message: Callable[..., str]) -> None:
        run: RunFolder = trainer.run_folder
        run.factor_file(1).unlink()
        assert "00001.safetensors is missing" in message()

    def test_evaluation_data_that_is_not_there(self, message: Callable[..., str]) -> None:
        assert "nowhere.npy" in message(verify=True, evaluation=Path("nowhere.npy"))

    def test_no_program_to_verify_with(self, message: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        expected = "verify: no program that loads packed is installed; known: omniquant-pl (omniquant_pl)"
        assert message("packed", verify=True) == expected

    def test_a_folder_that_cannot_be_made(self, message: Callable[..., str], tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        expected = f"output: {tmp_path / 'file' / 'out'} cannot be made: Not a directory"
        assert message(output=tmp_path / "file" / "out") == expected
