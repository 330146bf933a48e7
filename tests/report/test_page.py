"""The page: well-formed, self-contained, and its numbers are those of ``metrics.json``."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

import pytest

from omniquant_pl.report import write_report
from omniquant_pl.run.folder import RunFolder

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Finished

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Reader(HTMLParser):
    """Python's own parser of HTML: collects what the page claims, and refuses tags that are not closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.numbers: dict[str, tuple[str, str]] = {}
        self.titles: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.script = ""
        self._open: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.ids += [found["id"]] if found.get("id") else []
        self.links += [found[key] for key in ("src", "href", "xlink:href") if found.get(key)]
        if tag not in VOID:
            self._open.append((tag, found))

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        tag, found = self._open[-1] if self._open else ("", {})
        if tag == "data":
            self.numbers[str(found["data-key"])] = (str(found["value"]), data)
        elif tag == "h3":
            self.titles.append(data)
        elif tag == "script":
            self.script += data


@pytest.fixture(scope="module")
def read(finished: Finished) -> Reader:
    return Reader(finished.page)


def at(metrics: Any, key: str) -> Any:
    for part in key.split("."):
        metrics = metrics[int(part)] if isinstance(metrics, list) else metrics[part]
    return metrics


def in_seconds(text: str) -> float:
    units = {"h": 3600, "min": 60, "s": 1}
    return sum(float(count) * units[unit] for count, unit in re.findall(r"([\d.]+) (h|min|s)", text))


def in_bytes(text: str) -> float:
    count, unit = text.split()
    return float(count) * {"bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}[unit]


def test_values_are_those_of_the_metrics(read: Reader, finished: Finished) -> None:
    for key, (value, _) in read.numbers.items():
        assert json.loads(value) == at(finished.metrics, key), key


def test_what_is_shown_rounds_them(read: Reader, finished: Finished) -> None:
    for key, (_, shown) in read.numbers.items():
        value = at(finished.metrics, key)
        if key.startswith(("size_bytes", "peak_memory")):
            assert in_bytes(shown) == pytest.approx(value, rel=5e-3), key
        elif key.startswith("seconds"):
            assert in_seconds(shown) == pytest.approx(value, rel=0.01, abs=0.06), key
        elif key.startswith("perplexity") or key == "bits_per_weight":
            assert float(shown) == pytest.approx(value, abs=5.1e-3), key
        else:
            assert float(shown) == pytest.approx(value, rel=5.1e-3, abs=0.05), key


def test_nothing_is_left_out(read: Reader, finished: Finished) -> None:
    variants = ("full_precision", "round_to_nearest", "quantized")
    expected = {f"perplexity.{name}.{v}" for name in ("evaluation", "calibration") for v in variants}
    expected |= {f"seconds.{name}" for name in ("total", "calibration", "evaluation")}
    expected |= {"bits_per_weight", "size_bytes.quantized", "size_bytes.full_precision", "peak_memory_bytes.host"}
    expected |= {f"blocks.{i}.{name}" for i in range(2) for name in finished.metrics["blocks"][i] if name != "index"}
    assert set(read.numbers) == expected
    content = json.loads(read.script)
    assert content == {key: value for key, value in finished.metrics.items() if key != "checksum"}
    for package, version in finished.metrics["versions"].items():
        assert package in finished.page
        assert version in finished.page
    assert f"--config {finished.folder}/config.yaml" in finished.page
    assert "max_epochs: 3" in finished.page


def test_pictures(read: Reader, finished: Finished) -> None:
    linears = ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert [title for title in read.titles if title.startswith("self_attn.")] == [f"self_attn.{n}" for n in linears]
    expected = {"Error of each block", "Loss of each epoch", "Outliers into o_proj", "Peak memory in GB"}
    assert expected <= set(read.titles)
    assert finished.page.count("<svg") == len(read.titles) == len(set(read.titles))


def test_page_needs_nothing_but_itself(read: Reader, finished: Finished) -> None:
    assert all(link.startswith(("#", "data:")) for link in read.links)
    assert "url(http" not in finished.page
    assert "@import" not in finished.page


def test_pictures_do_not_share_names(read: Reader) -> None:
    assert len(read.ids) == len(set(read.ids))
    assert {link[1:] for link in read.links if link.startswith("#")} <= set(read.ids)


def test_colours_follow_the_page(finished: Finished) -> None:
    assert "prefers-color-scheme: dark" in finished.page
    assert "#0c0c0" not in finished.page  # every colour that stands for a variable is replaced
    defined = set(re.findall(r"(--[\w-]+):", finished.page))
    assert set(re.findall(r"var\((--[\w-]+)\)", finished.page)) <= defined


@pytest.fixture
def copy(finished: Finished, tmp_path: Path) -> RunFolder:
    shutil.copytree(finished.folder, tmp_path / "run")
    return RunFolder(tmp_path / "run")


def test_an_unfinished_run(copy: RunFolder) -> None:
    metrics = copy.read_metrics()
    metrics["blocks"] = metrics["blocks"][:1]
    for values in metrics["perplexity"].values():
        del values["quantized"]
    copy.write_metrics(metrics)
    write_report(copy, blocks=2, refresh_seconds=60)
    page = copy.report.read_text(encoding="utf-8")
    assert "1 of 2 blocks done" in page
    assert '<meta http-equiv="refresh" content="60">' in page
    assert not any("quantized" in key for key in Reader(page).numbers if key.startswith("perplexity"))


def test_zero_shot_tasks(copy: RunFolder) -> None:
    scores = {"acc": 0.51239, "acc_stderr": 0.0123, "acc_norm": 0.6}
    tasks = {"piqa": {"full_precision": scores, "quantized": {"acc": 0.5, "acc_stderr": 0.01}}}
    copy.write_metrics(copy.read_metrics() | {"zero_shot": tasks})
    write_report(copy)
    page = copy.report.read_text(encoding="utf-8")
    numbers = Reader(page).numbers
    assert numbers["zero_shot.piqa.full_precision.acc"] == ("0.51239", "0.5124")
    assert numbers["zero_shot.piqa.quantized.acc"] == ("0.5", "0.5000")
    assert "zero_shot.piqa.quantized.acc_norm" not in numbers
    assert "± 0.0123" in page


def test_what_a_run_lacks_is_left_out(copy: RunFolder) -> None:
    """Statistics that are damaged, numbers that were not finite, nothing learned, a name that is no HTML."""
    (copy.statistics / "00000.json").write_text("{")
    metrics = copy.read_metrics()
    metrics["blocks"][0]["relative_error"] = float("nan")
    metrics["perplexity"]["evaluation"]["round_to_nearest"] = float("inf")
    metrics["model"] = "</script><b>"
    copy.write_metrics(metrics)
    write_report(copy)
    read = Reader(copy.report.read_text(encoding="utf-8"))
    assert read.numbers["blocks.0.relative_error"] == ("null", "not finite")
    assert read.numbers["perplexity.evaluation.round_to_nearest"] == ("null", "not finite")
    assert json.loads(read.script)["model"] == "</script><b>"
    assert "Peak memory in GB" in read.titles  # of the other block
    assert "refresh" not in copy.report.read_text(encoding="utf-8")
