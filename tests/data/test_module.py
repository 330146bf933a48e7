"""The data module: which windows it hands out, and what it refuses."""

from __future__ import annotations

import copy
import logging
import random
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from omniquant_pl.data import CalibrationData, TextSettings
from omniquant_pl.errors import ConfigurationError

VOCABULARY = 100


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Words w0 to w98 are their number; 99 is put before every text."""
    vocabulary = {f"w{i}": i for i in range(99)} | {"<s>": 99}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 99)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="w0", model_max_length=16)


@pytest.fixture
def settings(tokenizer: PreTrainedTokenizerFast) -> TextSettings:
    return TextSettings(tokenizer, positions=16, vocabulary_size=VOCABULARY, seed=3)


def words(count: int, start: int = 1) -> str:
    return " ".join(f"w{i % 99}" for i in range(start, start + count))


def bound(settings: TextSettings, **arguments: object) -> CalibrationData:
    data = CalibrationData(**arguments)  # type: ignore[arg-type]
    data.bind(settings)
    return data


def without_tokenizer(positions: int = 16) -> TextSettings:
    return TextSettings(None, positions=positions, vocabulary_size=VOCABULARY, seed=3)


class TestText:
    def test_calibration_windows(self, settings: TextSettings, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text(words(60))
        data = bound(settings, dataset=str(tmp_path / "a.txt"), samples=6, sequence_length=8)
        stream = [99, *range(1, 61)]
        random.seed(3)
        starts = [random.randint(0, 61 - 8 - 1) for _ in range(6)]
        found = data.calibration_tokens()
        assert found.dtype == torch.int64
        assert found.tolist() == [stream[i : i + 8] for i in starts]

    def test_evaluation_windows(self, settings: TextSettings, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text(words(60))
        (tmp_path / "b.txt").write_text(words(20, start=40))
        names = [str(tmp_path / "b.txt"), str(tmp_path / "a.txt")]
        found = bound(settings, sequence_length=8, evaluation=names).evaluation_tokens()
        assert list(found) == ["b", "a"]
        assert found["a"].tolist() == torch.tensor([99, *range(1, 56)]).view(7, 8).tolist()
        assert found["b"].tolist() == [[99, *range(40, 47)], [*range(47, 55)]]

    def test_null_length_is_the_positions_or_2048(self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text(words(5000))
        for positions, length in ((16, 16), (4096, 2048)):
            settings = TextSettings(tokenizer, positions, VOCABULARY, 0)
            data = bound(settings, dataset=str(tmp_path / "a.txt"), samples=2)
            assert data.calibration_tokens().shape == (2, length)

    def test_builtin_is_the_default(self, settings: TextSettings) -> None:
        data = bound(settings)
        assert data.calibration_tokens().shape == (128, 16)
        assert list(data.evaluation_tokens()) == ["builtin"]
        assert data.evaluation_tokens()["builtin"].shape[1] == 16

    def test_no_warning_about_long_text(
        self, settings: TextSettings, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "a.txt").write_text(words(60))
        logging.getLogger("transformers").propagate = True
        with caplog.at_level(logging.WARNING):
            bound(settings, dataset=str(tmp_path / "a.txt"), samples=1).calibration_tokens()
        assert "longer than" not in caplog.text

    def test_read_once(self, settings: TextSettings, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text(words(60))
        name = str(tmp_path / "a.txt")
        data = bound(settings, dataset=name, samples=1, evaluation=[name])
        calibration, evaluation = data.calibration_tokens(), data.evaluation_tokens()
        (tmp_path / "a.txt").unlink()
        assert data.calibration_tokens() is calibration
        assert data.evaluation_tokens() is evaluation

    def test_binding_anew_forgets(self, settings: TextSettings, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text(words(60))
        data = bound(settings, dataset=str(tmp_path / "a.txt"), samples=1)
        assert data.calibration_tokens().shape == (1, 16)
        data.bind(TextSettings(settings.tokenizer, 9, VOCABULARY, 3))
        assert data.calibration_tokens().shape == (1, 9)


class TestDocuments:
    """c4: windows inside random documents."""

    texts = (words(3), words(30, start=20), words(9), words(50, start=40))

    @pytest.fixture(autouse=True)
    def hub(self, monkeypatch: pytest.MonkeyPatch) -> None:
        rows = datasets.Dataset.from_dict({"text": list(self.texts)})
        monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: rows)

    def expected(self, samples: int, length: int, seed: int) -> list[list[int]]:
        random.seed(seed)
        windows = []
        while len(windows) < samples:
            text = self.texts[random.randint(0, 3)]
            tokens = [99, *(int(word[1:]) for word in text.split())]
            if len(tokens) > length:
                i = random.randint(0, len(tokens) - length - 1)
                windows.append(tokens[i : i + length])
        return windows

    def test_calibration(self, settings: TextSettings) -> None:
        data = bound(settings, dataset="c4", samples=7, sequence_length=12)
        assert data.calibration_tokens().tolist() == self.expected(7, 12, seed=3)

    def test_evaluation_is_256_windows_of_seed_0(self, settings: TextSettings) -> None:
        data = bound(settings, evaluation=["c4"], samples=7, sequence_length=12)
        assert data.evaluation_tokens()["c4"].tolist() == self.expected(256, 12, seed=0)


class TestTokenFiles:
    @pytest.mark.parametrize("dtype", ["int64", "int32", "uint16"])
    def test_windows_are_used_as_they_are(self, tmp_path: Path, dtype: str) -> None:
        ids = np.arange(40).reshape(5, 8).astype(dtype)
        np.save(tmp_path / "ids.npy", ids)
        name = str(tmp_path / "ids.npy")
        data = bound(without_tokenizer(), dataset=name, samples=3, evaluation=[name])
        assert data.calibration_tokens().dtype == torch.int64
        assert data.calibration_tokens().tolist() == ids[:3].tolist()
        assert data.evaluation_tokens()["ids"].tolist() == ids.tolist()

    def test_stream(self, tmp_path: Path) -> None:
        np.save(tmp_path / "ids.npy", np.arange(50))
        name = str(tmp_path / "ids.npy")
        data = bound(without_tokenizer(), dataset=name, samples=4, sequence_length=6, evaluation=[name])
        draws = random.Random(3)
        starts = [draws.randint(0, 50 - 6 - 1) for _ in range(4)]
        assert data.calibration_tokens().tolist() == [list(range(i, i + 6)) for i in starts]
        assert data.evaluation_tokens()["ids"].tolist() == torch.arange(48).view(8, 6).tolist()

    def test_too_few_rows(self, tmp_path: Path) -> None:
        np.save(tmp_path / "ids.npy", np.zeros((5, 8), dtype=int))
        data = bound(without_tokenizer(), dataset=str(tmp_path / "ids.npy"), samples=6)
        with pytest.raises(ConfigurationError, match=r"data\.samples: 6 .*ids\.npy' has 5 rows"):
            data.calibration_tokens()

    def test_too_wide(self, tmp_path: Path) -> None:
        np.save(tmp_path / "ids.npy", np.zeros((5, 17), dtype=int))
        data = bound(without_tokenizer(), evaluation=[str(tmp_path / "ids.npy")])
        with pytest.raises(ConfigurationError, match=r"17.*ids\.npy.*16 positions") as caught:
            data.evaluation_tokens()
        assert caught.value.key == "data.sequence_length"

    @pytest.mark.parametrize("wrong", [-1, VOCABULARY, 5000])
    def test_outside_the_vocabulary(self, tmp_path: Path, wrong: int) -> None:
        ids = np.zeros((2, 8), dtype=int)
        ids[1, 5] = wrong
        np.save(tmp_path / "ids.npy", ids)
        data = bound(without_tokenizer(), dataset=str(tmp_path / "ids.npy"), samples=2)
        with pytest.raises(ConfigurationError) as caught:
            data.calibration_tokens()
        assert caught.value.key == "data.dataset"
        for part in ("ids.npy", f"token id {wrong},", "vocabulary of 100"):
            assert part in str(caught.value)

    @pytest.mark.parametrize(
        ("array", "message"),
        [
            (np.zeros((2, 8)), "holds float64"),
            (np.zeros((2, 8), dtype=bool), "holds bool"),
            (np.zeros((2, 8, 1), dtype=int), r"shape \[2, 8, 1\]"),
            (np.zeros((), dtype=int), r"shape \[\]"),
            (np.array([{"a": 1}], dtype=object), "cannot read"),
            (np.zeros((2, 1), dtype=int), "too short"),
        ],
    )
    def test_not_token_ids(self, tmp_path: Path, array: np.ndarray, message: str) -> None:
        np.save(tmp_path / "ids.npy", array, allow_pickle=True)
        data = bound(without_tokenizer(), dataset=str(tmp_path / "ids.npy"), samples=1)
        with pytest.raises(ConfigurationError, match=message):
            data.calibration_tokens()

    @pytest.mark.parametrize("content", [b"", b"not numpy"])
    def test_not_a_npy(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "ids.npy").write_bytes(content)
        data = bound(without_tokenizer(), evaluation=[str(tmp_path / "ids.npy")])
        with pytest.raises(ConfigurationError, match=r"data\.evaluation: cannot read .*ids\.npy"):
            data.evaluation_tokens()

    def test_an_archive(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "ids.npz", a=np.zeros(3, dtype=int))
        (tmp_path / "ids.npz").rename(tmp_path / "ids.npy")
        data = bound(without_tokenizer(), dataset=str(tmp_path / "ids.npy"))
        with pytest.raises(ConfigurationError, match="holds an archive"):
            data.calibration_tokens()

    def test_missing(self) -> None:
        data = bound(without_tokenizer(), dataset="gone.npy")
        with pytest.raises(ConfigurationError, match=r"^data\.dataset: .*no file 'gone\.npy'"):
            data.calibration_tokens()


class TestRefusals:
    @pytest.mark.parametrize("samples", [0, -3])
    def test_samples(self, samples: int) -> None:
        with pytest.raises(ConfigurationError, match=rf"^data\.samples: {samples} "):
            CalibrationData(samples=samples)

    @pytest.mark.parametrize("length", [1, 0, -4])
    def test_length(self, length: int) -> None:
        with pytest.raises(ConfigurationError, match=rf"^data\.sequence_length: {length} "):
            CalibrationData(sequence_length=length)

    def test_more_than_the_positions(self, settings: TextSettings) -> None:
        data = CalibrationData(sequence_length=17)
        with pytest.raises(ConfigurationError, match=r"^data\.sequence_length: 17 .* 16 positions"):
            data.bind(settings)

    @pytest.mark.parametrize("names", [["builtin", "builtin"], ["a/x.npy", "b/x.txt"], ["builtin", "builtin.txt"]])
    def test_two_of_one_name(self, names: list[str]) -> None:
        with pytest.raises(ConfigurationError) as caught:
            CalibrationData(evaluation=names)
        assert caught.value.key == "data.evaluation"
        assert all(f"'{name}'" in str(caught.value) for name in names)

    def test_nothing_to_evaluate(self, settings: TextSettings) -> None:
        assert bound(settings, evaluation=[]).evaluation_tokens() == {}

    def test_too_little_text(self, settings: TextSettings, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text(words(10))
        data = bound(settings, dataset=str(tmp_path / "a.txt"), samples=4)
        with pytest.raises(ConfigurationError) as caught:
            data.calibration_tokens()
        for part in ("a.txt", "11 tokens", "data.samples=4", "data.sequence_length=16"):
            assert part in str(caught.value)

    def test_text_without_a_tokenizer(self) -> None:
        with pytest.raises(ConfigurationError, match=r"data\.evaluation: .*no tokenizer"):
            bound(without_tokenizer()).evaluation_tokens()

    def test_a_tokenizer_of_another_model(self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text(words(60))
        data = bound(TextSettings(tokenizer, 16, 40, 3), dataset=str(tmp_path / "a.txt"))
        message = r"a\.txt' has the token 'w\d\d' \(id \d\d\), but the model has 40 embeddings; .* another tokenizer"
        with pytest.raises(ConfigurationError, match=message):
            data.calibration_tokens()

    def test_tokens_added_to_the_tokenizer_alone(self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
        added = copy.deepcopy(tokenizer)
        added.add_tokens(["<tool>"])
        (tmp_path / "a.txt").write_text(words(20) + " <tool> " + words(20))
        data = bound(TextSettings(added, 16, VOCABULARY, 3), evaluation=[str(tmp_path / "a.txt")])
        with pytest.raises(ConfigurationError, match=r"data\.evaluation: .* the token '<tool>' \(id 100\), but"):
            data.evaluation_tokens()

    def test_a_tokenizer_that_does_not_open(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text(words(60))
        data = bound(TextSettings(None, 16, VOCABULARY, 3, "it is broken"), dataset=str(tmp_path / "a.txt"))
        with pytest.raises(ConfigurationError, match=r"data\.dataset: '.*a\.txt' is text, and it is broken$"):
            data.calibration_tokens()

    def test_unbound(self) -> None:
        with pytest.raises(RuntimeError, match="bind"):
            CalibrationData().calibration_tokens()


def test_import_is_light() -> None:
    program = "import sys, omniquant_pl.data; print({'datasets', 'pyarrow'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
