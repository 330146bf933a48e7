"""What every test shares: tiny models, tokens, a trainer; skips that say what is missing."""

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from lightning.pytorch import Callback
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from omniquant_pl.callbacks import FoldCallback
from omniquant_pl.checkpoint import BlockCall
from omniquant_pl.data import CalibrationData
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.run.folder import RunFolder
from omniquant_pl.trainer import SequentialTrainer

ROOT = Path(__file__).parents[1]
REFERENCE = Path(os.environ.get("OMNIQUANT_REFERENCE", ROOT.parent / "shared" / "reference"))
CLIENTS = os.environ.get("OMNIQUANT_CLIENTS")

# The first call of a kernel is slow; a deadline would fail on that and on busy machines.
settings.register_profile("omniquant", deadline=None)
settings.load_profile("omniquant")

# Tensors are tiny here: further threads only wait for each other, for long on a busy machine.
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def assets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder where tokens are kept from run to run: one of the tests' own, for the processes they start too."""
    folder = tmp_path_factory.mktemp("assets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ASSETS_CACHE", str(folder))
        patch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def reference() -> Path:
    """The folder of reference models and results, for tests marked `reference`."""
    return REFERENCE


@pytest.fixture(scope="session")
def clients() -> str:
    """The Python interpreter of the programs that load exports, for tests marked `clients`."""
    assert CLIENTS is not None
    return CLIENTS


@cache
def _hub_answers() -> bool:
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        return False
    try:
        with socket.create_connection(("huggingface.co", 443), timeout=3):
            return True
    except OSError:
        return False


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test whose marker names something that this machine lacks."""
    if item.get_closest_marker("clients") and CLIENTS is None:
        pytest.skip("needs OMNIQUANT_CLIENTS, the Python that has the programs; make test-clients sets it")
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if item.get_closest_marker("reference") and not REFERENCE.is_dir():
        pytest.skip(f"needs the reference files in {REFERENCE}, or OMNIQUANT_REFERENCE")
    if item.get_closest_marker("hub") and not _hub_answers():
        pytest.skip("needs the Hugging Face hub")


TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 64,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="session")
def make_llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Saves a random LLaMA, with random norms and biases too, and returns its folder."""

    def make(max_shard_size: str = "1GB", **changes: Any) -> Path:
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            model = LlamaForCausalLM(LlamaConfig(**(TINY | changes)))
            for parameter in model.parameters():
                if parameter.ndim == 1:  # norms around one, biases around zero
                    parameter += 0.3 * torch.randn_like(parameter)
        folder = tmp_path_factory.mktemp("llama")
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        return folder

    return make


@pytest.fixture(scope="session")
def llama(make_llama: Callable[..., Path]) -> Path:
    """The plain one: two blocks, four heads, no biases, untied."""
    return make_llama()


@pytest.fixture(scope="session")
def tokens() -> Tensor:
    """Evaluation tokens `[windows, length]` for the tiny models."""
    return torch.randint(0, 64, (3, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def token_files(tokens: Tensor, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A file of calibration tokens `[6, 16]`, and one that holds `tokens`."""
    folder = tmp_path_factory.mktemp("tokens")
    calibration, evaluation = folder / "calibration.npy", folder / "evaluation.npy"
    np.save(calibration, np.random.default_rng(0).integers(0, 64, (6, 16)))
    np.save(evaluation, tokens.numpy())
    return calibration, evaluation


@pytest.fixture(scope="session")
def logits_of() -> Callable[[Path, Tensor], Tensor]:
    """What transformers alone makes of a folder: logits `[batch, tokens, vocabulary]`."""

    def logits(folder: Path, tokens: Tensor) -> Tensor:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            return model.eval()(tokens).logits

    return logits


@pytest.fixture
def fit(token_files: tuple[Path, Path], tmp_path: Path) -> Callable[..., SequentialTrainer]:
    """Calibrates a model without the command line, with a FoldCallback before the others."""

    def fit(
        model: OmniQuantModel,
        callbacks: Sequence[Callback] = (),
        data: dict[str, Any] | None = None,
        ckpt_path: str | None = None,
        **trainer_options: Any,
    ) -> SequentialTrainer:
        options = {
            "max_epochs": 1,
            "default_root_dir": tmp_path / "run",
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        callbacks = [FoldCallback(), *callbacks]
        trainer = SequentialTrainer(callbacks=callbacks, **(options | trainer_options))
        calibration, evaluation = (str(path) for path in token_files)
        settings = {"dataset": calibration, "samples": 6, "evaluation": [evaluation]}
        trainer.fit(model, datamodule=CalibrationData(**(settings | (data or {}))), ckpt_path=ckpt_path)
        return trainer

    return fit


@pytest.fixture(scope="session")
def finish(tmp_path_factory: pytest.TempPathFactory) -> Callable[[OmniQuantModel], RunFolder]:
    """Leaves what a run of no epochs does, for a model without a transformation: factors as they start."""

    def finish(model: OmniQuantModel) -> RunFolder:
        run = RunFolder(tmp_path_factory.mktemp("run"))
        for index in range(len(model.source)):
            block = model.block(index, model.source.block_tensors(index), BlockCall(), {})
            run.save_factors(index, block.factors.export())
        return run

    return finish


@pytest.fixture(autouse=True)
def _without_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing a report takes seconds: only tests that look at it have it drawn."""
    if request.node.get_closest_marker("report") is None:
        monkeypatch.setattr("omniquant_pl.callbacks.report.write_report", lambda *_, **__: None)


@pytest.fixture(autouse=True)
def _own_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the seed that a test's command line sets from the tests after it."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "2")
