"""The run folder: names that others read, and files that are not what they should be."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from omniquant_pl.errors import ConfigurationError
from omniquant_pl.run.folder import MADE_BY, RunFolder


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def test_names(folder: RunFolder) -> None:
    names = [folder.config, folder.metrics, folder.factor_file(0), folder.factor_file(123)]
    assert [str(path.relative_to(folder.path)) for path in (*names, folder.model)] == [
        "config.yaml",
        "metrics.json",
        "blocks/00000.safetensors",
        "blocks/00123.safetensors",
        "model",
    ]


class TestFactors:
    def test_survive(self, folder: RunFolder) -> None:
        factors = {"a.clip.upper": torch.randn(3, 2), "b.scale": torch.randn(4)}
        folder.save_factors(2, factors)
        for loaded in (folder.load_factors(2), load_file(folder.factor_file(2))):
            torch.testing.assert_close(loaded, factors, rtol=0, atol=0)

    def test_missing_file_names_itself_and_the_setting(self, folder: RunFolder) -> None:
        with pytest.raises(ConfigurationError, match=r"^trainer\.default_root_dir: ") as caught:
            folder.load_factors(3)
        assert str(folder.factor_file(3)) in str(caught.value)
        with pytest.raises(ConfigurationError, match=r"^model\.parameters: "):
            folder.load_factors(3, "model.parameters")

    def test_damaged_file_names_itself(self, folder: RunFolder) -> None:
        folder.save_factors(0, {"a": torch.zeros(100)})
        path = folder.factor_file(0)
        path.write_bytes(path.read_bytes()[:-40])
        with pytest.raises(ConfigurationError, match="is damaged") as caught:
            folder.load_factors(0)
        assert str(path) in str(caught.value)


class TestMetrics:
    def test_survive(self, folder: RunFolder) -> None:
        folder.write_metrics({"perplexity": {"a": 1.5}, "blocks": []})
        assert folder.read_metrics() == {"perplexity": {"a": 1.5}, "blocks": []}
        stored = json.loads(folder.metrics.read_text())
        assert {name: stored[name] for name in folder.read_metrics()} == folder.read_metrics()

    def test_a_digit_that_has_changed_is_noticed(self, folder: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
        folder.write_metrics({"perplexity": {"a": 1.5}})
        folder.metrics.write_text(folder.metrics.read_text().replace("1.5", "1.4"))
        assert folder.read_metrics() == {}
        assert str(folder.metrics) in caplog.text

    def test_of_an_older_release_count(self, folder: RunFolder) -> None:
        folder.path.mkdir()
        folder.metrics.write_text('{"perplexity": {"a": 1.5}}')
        assert folder.read_metrics() == {"perplexity": {"a": 1.5}}

    def test_none_yet(self, folder: RunFolder) -> None:
        assert folder.read_metrics() == {}


CONFIG: dict[str, Any] = {
    "seed_everything": 2,
    "model": {"path": "a", "weights": {"bits": 4, "group_size": None}},
    "data": {"dataset": "builtin", "evaluation": ["builtin"]},
    "trainer": {"max_epochs": 20, "precision": None, "devices": 1},
}


class TestOtherSettings:
    @pytest.fixture
    def used(self, folder: RunFolder) -> RunFolder:
        folder.save_factors(0, {"a": torch.zeros(1)})
        folder.config.write_text(yaml.safe_dump(CONFIG))
        return folder

    @staticmethod
    def changed(key: str, value: object) -> dict[str, Any]:
        config = json.loads(json.dumps(CONFIG))
        *sections, name = key.split(".")
        section = config
        for part in sections:
            section = section[part]
        section[name] = value
        return dict(config)

    @pytest.mark.parametrize(
        ("key", "value", "named"),
        [
            ("seed_everything", 3, "seed_everything"),
            ("model.path", "b", "model.path"),
            ("model.weights.bits", 3, "model.weights"),
            ("data.dataset", "wikitext2", "data.dataset"),
            ("trainer.max_epochs", 1, "trainer.max_epochs"),
            ("trainer.precision", "bf16-mixed", "trainer.precision"),
            ("trainer.callbacks", [{"class_path": "KeepBestState"}], "trainer.callbacks"),
            ("trainer.limit_train_batches", 2, "trainer.limit_train_batches"),
            ("trainer.accumulate_grad_batches", 4, "trainer.accumulate_grad_batches"),
            ("trainer.gradient_clip_val", 1.0, "trainer.gradient_clip_val"),
            ("trainer.gradient_clip_algorithm", "value", "trainer.gradient_clip_algorithm"),
            ("trainer.strategy", "block_parallel", "trainer.strategy"),
            ("trainer.strategy", {"class_path": "BlockParallelStrategy"}, "trainer.strategy"),
        ],
    )
    def test_are_refused(self, used: RunFolder, key: str, value: object, named: str) -> None:
        with pytest.raises(ConfigurationError, match=r"^trainer\.default_root_dir: ") as caught:
            used.check_same_settings(self.changed(key, value))
        assert named in str(caught.value)
        assert str(used.path) in str(caught.value)

    @pytest.mark.parametrize(
        ("first", "second", "is_same"),
        [
            ({"segments": 2}, {"segments": 2, "process_group_backend": "gloo"}, True),
            ({"segments": 2}, {"segments": 4}, False),
            ({"segments": None}, {"segments": 4}, True),
            ({"segments": 2, "stitch_epochs": 5}, {"segments": 2, "stitch_epochs": 0}, False),
            ({"stitch_epochs": 0, "stitch_blocks": 1}, {"stitch_epochs": 0, "stitch_blocks": 2}, True),
            ({"stitch_epochs": 1, "stitch_blocks": 1}, {"stitch_epochs": 1, "stitch_blocks": 2}, False),
        ],
    )
    def test_segments_decide(
        self, used: RunFolder, first: dict[str, Any], second: dict[str, Any], is_same: bool
    ) -> None:
        one, two = (
            self.changed("trainer.strategy", {"class_path": "omniquant_pl.BlockParallelStrategy", "init_args": options})
            for options in (first, second)
        )
        used.config.write_text(yaml.safe_dump(one))
        if is_same:
            used.check_same_settings(two)
            return
        with pytest.raises(ConfigurationError, match=r"another trainer\.strategy"):
            used.check_same_settings(two)

    @pytest.mark.parametrize(
        ("key", "value"), [("data.evaluation", ["c4"]), ("trainer.devices", "auto"), ("trainer.strategy", "ddp")]
    )
    def test_that_decide_nothing_pass(self, used: RunFolder, key: str, value: object) -> None:
        used.check_same_settings(CONFIG)
        used.check_same_settings(self.changed(key, value))

    def test_nothing_to_protect(self, used: RunFolder) -> None:
        used.factor_file(0).unlink()
        used.check_same_settings(self.changed("model.path", "b"))


def test_a_new_run_moves_what_the_last_one_left(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    for content in (1.0, 2.0):
        folder.start()
        assert not folder.factor_file(0).exists()
        folder.save_factors(0, {"scale": torch.tensor([content])})
        folder.write_metrics({"model": str(content)})
    assert folder.load_factors(0)["scale"].item() == 2.0
    previous = RunFolder(folder.path / "previous")
    assert previous.load_factors(0)["scale"].item() == 1.0
    assert previous.read_metrics() == {"model": "1.0"}


class Killed(Exception):  # noqa: N818
    """The process is gone."""


class TestAStartThatIsKilled:
    """Runs leave a number each; whatever is killed, the last that was whole is in previous/ after the next start."""

    LEFT = ("blocks", "segments", "model", "metrics.json", "report.html", "statistics", "last.ckpt", "window.ckpt")

    def leave(self, folder: RunFolder, number: int) -> None:
        for name in self.LEFT:
            path = folder.path / name if "." in name else folder.path / name / "file"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(str(number))
        (folder.model / "README.md").write_text(MADE_BY)

    def numbers(self, folder: Path) -> list[str]:
        paths = [folder / name for name in self.LEFT]
        return [(path / "file" if path.is_dir() else path).read_text() for path in paths if path.exists()]

    def start_killed(self, folder: RunFolder, monkeypatch: pytest.MonkeyPatch, kind: str, steps: int) -> None:
        """Ends it at the n-th call of a kind: a file is moved, or what was in previous/ is deleted."""
        owner = shutil if kind == "rmtree" else Path
        whole, calls = getattr(owner, kind), iter(range(100))

        def killed(path: Path, *arguments: Any, **options: Any) -> Any:
            if path.name == "streams" or next(calls) < steps:
                return whole(path, *arguments, **options)
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(owner, kind, killed)
            with pytest.raises(Killed):
                folder.start()

    def test_it_says_what_moves_and_what_is_deleted(self, folder: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
        self.leave(folder, 1)
        folder.start()
        names = ", ".join(sorted(self.LEFT))
        (line,) = caplog.messages
        moved = re.fullmatch(rf"{folder.path} holds a run: (.*) move to {folder.path / 'previous'}", line)
        assert moved is not None
        assert ", ".join(sorted(moved[1].split(", "))) == names
        caplog.clear()
        self.leave(folder, 2)
        folder.start()
        assert caplog.messages[0].endswith(f"; what {folder.path / 'previous'} holds, of the run before, is deleted")

    def test_a_model_of_somebody_else_stays(self, folder: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
        for number in (1, 2):
            folder.model.mkdir(parents=True)
            (folder.model / "mine.txt").write_text(str(number))
            for _ in range(3):
                folder.start()
            assert (folder.path / f"model-{number}" / "mine.txt").read_text() == str(number)
            assert any("none of this run's exports" in message for message in caplog.messages)
        assert not (folder.path / "previous").exists()

    @pytest.mark.parametrize(("kind", "steps"), [("rmtree", 0), ("rename", 0), ("rename", 3), ("rename", 8)])
    def test_the_next_one_finishes_it(
        self, folder: RunFolder, monkeypatch: pytest.MonkeyPatch, kind: str, steps: int
    ) -> None:
        for number in (1, 2):
            self.leave(folder, number)
            if number == 1:
                folder.start()
        self.start_killed(folder, monkeypatch, kind, steps)
        folder.start()
        assert self.numbers(folder.path / "previous") == ["2"] * len(self.LEFT)
        assert self.numbers(folder.path) == []
        assert not (folder.path / "previous.part").exists()

    def test_a_run_since_then_is_another(self, folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
        """As one that went on with --ckpt_path last, which starts nothing."""
        self.leave(folder, 1)
        self.start_killed(folder, monkeypatch, "rmtree", 0)
        self.leave(folder, 2)
        folder.start()
        assert self.numbers(folder.path / "previous") == ["2"] * len(self.LEFT)
        assert self.numbers(folder.path) == []


@pytest.mark.parametrize(
    "place",
    [
        "blocks/.00000.safetensors.abc.part",
        ".metrics.json.abc.part",
        "streams/.stream-abc",
        "streams/.streams.json.abc.part",
        "streams/00001-of-00002/.stream-abc",
        "segments/00001/streams/.stream-abc",
        "segments/00001/streams/00001-of-00002/.stream-abc",
        "segments/00001/stitched/streams/.stream-abc",
        "segments/00001/stitched/blocks/.00002.safetensors.abc.part",
    ],
)
def test_what_a_killed_process_had_begun_is_removed_under_the_lock(folder: RunFolder, place: str) -> None:
    part = folder.path / place
    whole = part.with_name("00001.quantized.bin")
    part.parent.mkdir(parents=True)
    part.write_bytes(b"half")
    whole.write_bytes(b"whole")
    with folder.locked():
        assert not part.exists()
        assert whole.read_bytes() == b"whole"
        part.touch()
        with pytest.raises(ConfigurationError, match="another process"), RunFolder(folder.path).locked():
            pass
        assert part.exists()


def test_what_another_run_inside_has_begun_stays(folder: RunFolder) -> None:
    """A comparison's fits have locks of their own."""
    part = RunFolder(folder.comparison / "rtn").streams / ".stream-abc"
    part.parent.mkdir(parents=True)
    part.touch()
    with folder.locked():
        assert part.exists()


class TestSegments:
    """Until they are joined, finished blocks of a block-parallel run are in its segments alone."""

    @pytest.fixture(params=["00001", "00001/stitched"])
    def segment(self, folder: RunFolder, request: pytest.FixtureRequest) -> RunFolder:
        segment = RunFolder(folder.segments / request.param)
        segment.save_factors(2, {"scale": torch.ones(1)})
        segment.streams.mkdir()
        (segment.streams / "00002.quantized.bin").touch()
        return segment

    def test_a_new_run_moves_them(self, folder: RunFolder, segment: RunFolder) -> None:
        folder.start()
        assert not folder.segments.exists()
        moved = RunFolder(folder.path / "previous" / segment.path.relative_to(folder.path))
        assert moved.load_factors(2)["scale"].item() == 1
        assert not moved.streams.exists()  # as large as they are useless

    def test_they_are_protected(self, folder: RunFolder, segment: RunFolder) -> None:
        assert segment.factor_file(2).is_file()
        folder.config.write_text(yaml.safe_dump(CONFIG))
        folder.check_same_settings(CONFIG)
        with pytest.raises(ConfigurationError, match=r"another seed_everything"):
            folder.check_same_settings(CONFIG | {"seed_everything": 3})


class TestInsideAnother:
    @pytest.fixture
    def outer(self, folder: RunFolder) -> RunFolder:
        with folder.locked():
            folder.config.write_text("{}")
        return folder

    def test_is_refused(self, outer: RunFolder) -> None:
        with (
            pytest.raises(ConfigurationError, match="is inside the folder of another run"),
            RunFolder(outer.path / "deeper" / "run").locked(),
        ):
            pass

    def test_fits_of_a_comparison_are_the_runs_own(self, outer: RunFolder) -> None:
        with RunFolder(outer.comparison).locked(), RunFolder(outer.comparison / "rtn").locked():
            assert (outer.comparison / "rtn" / ".lock").is_file()
