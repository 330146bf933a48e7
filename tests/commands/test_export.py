"""``export``: what is refused before any work, and how the result is verified."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from omniquant_pl.commands.export import export_run
from omniquant_pl.data import CalibrationData
from omniquant_pl.errors import CalibrationError, ConfigurationError
from omniquant_pl.export.hf import HfExport
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.run.folder import RunFolder
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
        return export_run(trainer, model, data, format_name, str(output), **settings)

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
        assert refusal.startswith(f"format: {format_name} cannot hold this model exactly: ")
        assert "formats that can: hf, compressed-tensors" in refusal

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

    @pytest.mark.parametrize("place", ["run", ".", "..", "run/blocks", "model", "model/deeper", "model/.."])
    def test_a_folder_that_holds_the_run_or_the_model(
        self,
        place: str,
        llama: Path,
        message: Callable[..., str],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        output = Path(place) if place.partition("/")[0] != "model" else llama / Path(place).relative_to("model")
        before = {path: path.read_bytes() for path in (*tmp_path.rglob("*"), *llama.iterdir()) if path.is_file()}
        refusal = message(output=output)
        assert refusal.startswith(f"output: {output} ")
        assert "take one that is new or empty, or holds an earlier export alone" in refusal
        assert {path: path.read_bytes() for path in before} == before
        assert not (llama / "deeper").exists()

    @pytest.mark.parametrize("name", ["notes.txt", "README.md", "other/model.safetensors"])
    def test_a_folder_of_somebody_else(self, name: str, message: Callable[..., str], tmp_path: Path) -> None:
        path = tmp_path / "mine" / name
        path.parent.mkdir(parents=True)
        path.write_text("not an export")
        assert message(output=tmp_path / "mine").startswith(f"output: {tmp_path / 'mine'} holds something else")
        assert path.read_text() == "not an export"

    def test_a_file(self, message: Callable[..., str], tmp_path: Path) -> None:
        (tmp_path / "file").write_text("not an export")
        assert "holds something else" in message(output=tmp_path / "file")
        assert (tmp_path / "file").read_text() == "not an export"

    def test_an_export_that_somebody_has_put_folders_into(self, export: Export, tmp_path: Path) -> None:
        export("hf")
        (tmp_path / "out" / "runs").mkdir()
        with pytest.raises(ConfigurationError, match="holds something else than an earlier export"):
            export("hf")


@pytest.mark.parametrize("format_name", ["hf", "packed", "factors"])
def test_an_earlier_export_is_replaced(format_name: str, export: Export) -> None:
    for _ in range(2):
        folder = export(format_name)
        assert not (folder / "of_the_first").exists()
        (folder / "of_the_first").touch()


def test_an_empty_folder_and_one_of_an_earlier_release_are_taken(export: Export, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    old = tmp_path / "old"
    old.mkdir()
    (old / "README.md").write_text("# llama\n\nCalibrated with omniquant-pl (learned clipping) on 6 samples.\n")
    (old / "model-00001-of-00002.safetensors").touch()
    for folder in (tmp_path / "empty", old):
        assert load_file(export("hf", output=folder) / "model.safetensors")
    assert not (old / "model-00001-of-00002.safetensors").exists()


def test_what_a_link_leads_to_is_replaced(export: Export, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    export("hf", output=tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "model.safetensors").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link", "run"]
