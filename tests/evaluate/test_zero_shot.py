"""lm-eval's accuracies on a local task, against log-likelihoods in float64; tasks that cannot be loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from omniquant_pl.cli.program import run
from omniquant_pl.errors import ConfigurationError
from omniquant_pl.evaluate import ZeroShot, zero_shot_table
from omniquant_pl.runtime import load_packed

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'omniquant-pl[eval]'")
pytest.importorskip("accelerate", reason="needs accelerate: pip install 'omniquant-pl[eval]'")

EMBEDDED = Path(__file__).parents[2] / "omniquant_pl" / "models" / "tiny-llama"
QUESTIONS = [
    {"question": "What does the function return", "choices": ["a list of strings", "the water"], "label": 0},
    {"question": "Raise an exception if", "choices": ["a purple cat sleeps there", "the value is None"], "label": 1},
    {"question": "The keyword argument is", "choices": ["river", "optional"], "label": 1},
    {"question": "This module defines", "choices": ["several classes", "sugar and some milk"], "label": 0},
    {"question": "The default value is", "choices": ["False", "Tuesday in the morning"], "label": 1},
    {"question": "Open the file and", "choices": ["eat", "read its contents as bytes"], "label": 1},
    {"question": "If the object is not", "choices": ["hashable", "a"], "label": 0},
]
PROMPT = "Question: {question}\nAnswer:"
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def make_task(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Writes a folder with a task file and its questions, and returns the task file."""

    def make(name: str = "python_words", **changes: Any) -> Path:
        folder = tmp_path_factory.mktemp("tasks")
        data = folder / "questions.jsonl"
        data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
        metrics = [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
        ]
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"validation": str(data)}},
            "output_type": "multiple_choice",
            "validation_split": "validation",
            "doc_to_text": "Question: {{question}}\nAnswer:",
            "doc_to_target": "label",
            "doc_to_choice": "choices",
            "metric_list": metrics,
        }
        path = folder / f"{name}.yaml"
        path.write_text(json.dumps(task | changes))  # JSON is YAML
        return path

    return make


def expected(logits: Callable[[Tensor], Tensor], tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """Accuracies by the sum of the choice's log-likelihoods, as it is and by its bytes."""
    right = {"acc": 0, "acc_norm": 0}
    for question in QUESTIONS:
        prompt = PROMPT.format(**question)
        sums = []
        for choice in question["choices"]:
            ids = torch.tensor([tokenizer(f"{prompt} {choice}")["input_ids"]])
            begin = len(tokenizer(prompt)["input_ids"])
            likelihoods = logits(ids).double().log_softmax(-1)
            sums.append(sum(float(likelihoods[0, place - 1, ids[0, place]]) for place in range(begin, ids.shape[1])))
        by_bytes = [total / len(choice.encode()) for total, choice in zip(sums, question["choices"], strict=True)]
        for metric, values in (("acc", sums), ("acc_norm", by_bytes)):
            right[metric] += values.index(max(values)) == question["label"]
    return {metric: count / len(QUESTIONS) for metric, count in right.items()}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the embedded model that hurts: weights and activations in 4 bit, without an epoch."""
    folder = tmp_path_factory.mktemp("run")
    data = ["--data.samples=2", "--data.sequence_length=32", "--data.evaluation=[]"]
    trainer = ["--trainer.max_epochs=0", "--trainer.accelerator=cpu", f"--trainer.default_root_dir={folder}"]
    run(["fit", "--config=w4a4.yaml", *data, *trainer, "--export.format=packed", "--progress.quiet=true"])
    return folder


def test_scores_are_those_of_the_formula(run_folder: Path, make_task: Make) -> None:
    """Of the original, and of the quantized model, whose activations are quantized as well."""
    run(["test", f"--config={run_folder / 'config.yaml'}", f"--zero_shot=[{make_task()}]"])
    found = json.loads((run_folder / "metrics.json").read_text())["zero_shot"]["python_words"]
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    original = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float64)
    packed = load_packed(run_folder / "model", torch.float64)
    with torch.no_grad():
        for variant, model in (("full_precision", original), ("quantized", packed)):
            accuracies = expected(lambda ids, model=model: model(ids).logits, tokenizer)
            assert {metric: found[variant][metric] for metric in accuracies} == pytest.approx(accuracies)
            accuracy = accuracies["acc"]
            error = (accuracy * (1 - accuracy) / (len(QUESTIONS) - 1)) ** 0.5
            assert found[variant]["acc_stderr"] == pytest.approx(error)
    assert 0 < found["full_precision"]["acc"] < 1


def test_an_exported_folder_and_a_folder_of_tasks(
    run_folder: Path, make_task: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    config, task = run_folder / "config.yaml", make_task("words_of_a_folder")
    exported = run_folder / "model"
    run(["test", f"--config={config}", f"--zero_shot=[{task.parent}]", f"--exported={exported}"])
    found = json.loads((run_folder / "metrics.json").read_text())["zero_shot"]["words_of_a_folder"]
    assert set(found) == {"full_precision", "exported"}
    assert "words_of_a_folder" in capsys.readouterr().out
    before = (run_folder / "metrics.json").read_bytes()
    run(["test", f"--config={config}", f"--zero_shot=[{task}]", f"--exported={exported}", "--limit=2", "--shots=1"])
    assert (run_folder / "metrics.json").read_bytes() == before
    assert "words_of_a_folder, 1 shots" in " ".join(capsys.readouterr().out.split())


class TestRefused:
    def test_unknown_name(self, make_task: Make) -> None:
        with pytest.raises(ConfigurationError, match=r"zero_shot: 'piqua' is neither .*; near it: piqa"):
            ZeroShot(["piqua"])

    def test_no_task(self) -> None:
        with pytest.raises(ConfigurationError, match=r"zero_shot: .* names no task"):
            ZeroShot([])

    def test_folder_without_tasks(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match=r"zero_shot: there is no task file"):
            ZeroShot([str(tmp_path)])

    def test_data_that_is_not_there(self, make_task: Make) -> None:
        path = make_task(dataset_kwargs={"data_files": {"validation": "gone.jsonl"}})
        with pytest.raises(ConfigurationError, match=f"zero_shot: {path} cannot be loaded: "):
            ZeroShot([str(path)])

    def test_twice(self, make_task: Make) -> None:
        with pytest.raises(ConfigurationError, match=r"names a task twice: python_words, python_words"):
            ZeroShot([str(make_task()), str(make_task())])

    @pytest.mark.parametrize("wrong", [{"shots": -1}, {"limit": 0}, {"batch_size": 0}])
    def test_numbers(self, make_task: Make, wrong: dict[str, int]) -> None:
        with pytest.raises(ConfigurationError, match=f"{next(iter(wrong))}: "):
            ZeroShot([str(make_task())], **wrong)

    def test_an_exported_folder_alone(self, run_folder: Path) -> None:
        with pytest.raises(ConfigurationError, match=r"exported: only tasks are measured on a folder"):
            run(["test", f"--config={run_folder / 'config.yaml'}", f"--exported={run_folder / 'model'}"])

    def test_a_folder_that_is_no_model(self, run_folder: Path, make_task: Make, tmp_path: Path) -> None:
        arguments = [f"--zero_shot=[{make_task()}]", f"--exported={tmp_path}"]
        with pytest.raises(ConfigurationError, match=r"exported: .* is no model folder"):
            run(["test", f"--config={run_folder / 'config.yaml'}", *arguments])

    def test_a_model_without_tokenizer(
        self, run_folder: Path, make_task: Make, token_files: tuple[Path, Path], tmp_path: Path
    ) -> None:
        """In front of everything: the task's data are not there either, and no perplexity is written down."""
        model, run_without = tmp_path / "model", tmp_path / "run"
        model.mkdir()
        for name in ("config.json", "model.safetensors"):
            shutil.copy(EMBEDDED / name, model)
        shutil.copytree(run_folder, run_without)
        config = yaml.safe_load((run_folder / "config.yaml").read_text())
        config["model"]["path"], config["trainer"]["default_root_dir"] = str(model), str(run_without)
        config["data"] |= {"dataset": str(token_files[0]), "evaluation": [str(token_files[1])]}
        (run_without / "config.yaml").write_text(yaml.safe_dump(config))
        task = make_task(dataset_kwargs={"data_files": {"validation": "gone.jsonl"}})
        before = (run_without / "metrics.json").read_bytes()
        with pytest.raises(ConfigurationError, match=f"zero_shot: {model} has no tokenizer .*leave zero_shot out"):
            run(["test", f"--config={run_without / 'config.yaml'}", f"--zero_shot=[{task}]"])
        (model / "tokenizer.json").write_text("{")
        with pytest.raises(ConfigurationError, match=r"zero_shot: .*cannot be opened: tokenizer\.json is not JSON"):
            run(["test", f"--config={run_without / 'config.yaml'}", f"--zero_shot=[{task}]"])
        assert (run_without / "metrics.json").read_bytes() == before


def test_the_names_of_the_help_are_known() -> None:
    from lm_eval.tasks import TaskManager

    names = {"piqa", "arc_easy", "arc_challenge", "boolq", "hellaswag", "winogrande", "mmlu"}
    assert names <= TaskManager().task_index.keys()


def test_table() -> None:
    scores = {"acc": 0.5, "acc_stderr": 0.1, "exact_match,strict": 0.25, "exact_match_stderr,strict": 0.01}
    table = zero_shot_table({"task": {"full_precision": scores, "quantized": {"acc": 0.4}}})
    columns = [list(column.cells) for column in table.columns]
    assert columns == [
        ["task", "task"],
        ["acc", "exact_match,strict"],
        ["0.5000 ± 0.1000", "0.2500 ± 0.0100"],
        ["0.4000", ""],
    ]
