"""What an export takes the place of, and what comes along with it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from omniquant_pl.errors import ConfigurationError
from omniquant_pl.export import HfExport
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.run.folder import RunFolder
from omniquant_pl.spec import WeightSpec

TEMPLATES = "additional_chat_templates"


@pytest.fixture
def write(
    make_llama: Callable[..., Path], finish: Callable[[OmniQuantModel], RunFolder], tmp_path: Path
) -> Callable[[], Path]:
    """Exports a model with two chat templates to the same folder, each time anew."""
    source = Path(shutil.copytree(make_llama(), tmp_path / "source"))
    (source / TEMPLATES).mkdir()
    for name in ("rag.jinja", "tool_use.jinja", "notes.txt"):
        (source / TEMPLATES / name).write_text(name)
    model = OmniQuantModel(str(source), WeightSpec(4))
    run = finish(model)

    def write() -> Path:
        HfExport().write(model, run, tmp_path / "out")
        return tmp_path / "out"

    return write


def test_chat_templates_come_along_and_are_replaced(write: Callable[[], Path]) -> None:
    for _ in range(2):
        folder = write()
        assert sorted(path.name for path in (folder / TEMPLATES).iterdir()) == ["rag.jinja", "tool_use.jinja"]
        (folder / TEMPLATES / "of_another_model.jinja").touch()


@pytest.mark.parametrize(
    "name",
    [f"{TEMPLATES}/notes.txt", f"{TEMPLATES}/mine/notes.txt", f"{TEMPLATES}/mine.jinja/notes.txt", "mine/a.jinja"],
)
def test_what_no_export_writes_stays(write: Callable[[], Path], name: str) -> None:
    path = write() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    with pytest.raises(ConfigurationError, match=r"^output: .*/out holds something else than an earlier export"):
        write()
    assert path.read_text() == "mine"


def test_a_linked_folder_of_templates_is_none_of_an_export(write: Callable[[], Path], tmp_path: Path) -> None:
    folder, elsewhere = write(), tmp_path / "elsewhere"
    shutil.move(folder / TEMPLATES, elsewhere)
    (folder / TEMPLATES).symlink_to(elsewhere)
    with pytest.raises(ConfigurationError, match="holds something else than an earlier export"):
        write()
    assert sorted(path.name for path in elsewhere.iterdir()) == ["rag.jinja", "tool_use.jinja"]
