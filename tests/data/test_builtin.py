"""The embedded text: its content, its split, its errors."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from omniquant_pl.data import builtin
from omniquant_pl.data.builtin import builtin_identity, builtin_text, document_split
from omniquant_pl.errors import ConfigurationError


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library of our own; the topics stay those of this Python."""
    monkeypatch.setattr(builtin.sysconfig, "get_path", lambda name: str(tmp_path))
    builtin._documents.cache_clear()
    builtin_text.cache_clear()
    yield tmp_path
    builtin._documents.cache_clear()
    builtin_text.cache_clear()


def documents() -> dict[str, str]:
    return {n: t for n, t in builtin._documents() if not n.startswith("topic:")}


class TestThisPython:
    def test_docstrings_and_topics_are_there(self) -> None:
        text = builtin_text("train") + "\n\n" + builtin_text("evaluation")
        for docstring in (json.dumps.__doc__, json.JSONDecoder.__doc__, Path.__doc__):
            assert inspect.cleandoc(docstring) in text
        from pydoc_data.topics import topics

        assert all(inspect.cleandoc(topic) in text for topic in topics.values())

    def test_a_package_is_on_one_side(self) -> None:
        names = {n for n, _ in builtin._documents() if not n.startswith("topic:")}
        packages = {name.split(".")[0] for name in names}
        for package in packages:
            members = [n for n in names if n.split(".")[0] == package]
            assert len({document_split(n) for n in members}) == 1

    def test_no_docstring_is_on_both_sides(self) -> None:
        train, evaluation = set(), set()
        for name, text in builtin._documents():
            side = train if document_split(name) == "train" else evaluation
            side.update(part for part in text.split("\n\n") if len(part) > 400)
        assert not train & evaluation

    def test_held_out_share(self) -> None:
        evaluation = len(builtin_text("evaluation"))
        assert 0.05 < evaluation / (evaluation + len(builtin_text("train"))) < 0.10

    def test_enough_text_and_encodable(self) -> None:
        assert len(builtin_text("train").encode("utf-8")) > 1_500_000

    def test_equal_in_another_process(self) -> None:
        program = (
            "import hashlib; from omniquant_pl.data.builtin import builtin_text;"
            "print(hashlib.sha256(builtin_text('evaluation').encode()).hexdigest())"
        )
        run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        expected = hashlib.sha256(builtin_text("evaluation").encode()).hexdigest()
        assert run.stdout.strip() == expected


class TestSplit:
    @pytest.mark.parametrize(
        ("name", "group"),
        [
            ("asyncio.base_events", "asyncio"),
            ("os", "os"),
            ("topic:global", "topic:global"),
            ("_pydatetime", "datetime"),
        ],
    )
    def test_is_the_hash_of_the_group(self, name: str, group: str) -> None:
        first = int(hashlib.sha256(group.encode()).hexdigest()[:2], 16)
        assert document_split(name) == ("evaluation" if first / 256 < 0.07 else "train")

    def test_known_names_stay_where_they_are(self) -> None:
        held_out = ["imaplib", "queue", "pydoc", "operator", "cmd", "topic:global", "topic:await"]
        assert all(document_split(name) == "evaluation" for name in held_out)
        kept = ["asyncio.base_events", "email.message", "datetime", "_pydatetime", "topic:class"]
        assert all(document_split(name) == "train" for name in kept)


class TestExtraction:
    def test_modules_classes_functions_are_read_but_never_run(self, library: Path) -> None:
        source = '''"""The module."""
raise RuntimeError("imported")
class A:
    """The class.

    Example:
        indented
    """
    async def b(self):
        """The method."""
def c():
    "The function."
    return "not a docstring"
'''
        (library / "one.py").write_text(source)
        assert documents() == {
            "one": "The module.\n\nThe class.\n\nExample:\n    indented\n\nThe function.\n\nThe method."
        }
        assert ast.parse(source)  # the sample itself is sound

    def test_sorted_nested_and_deduplicated(self, library: Path) -> None:
        (library / "b.py").write_text('"""Shared."""\ndef f():\n    """Own."""\n')
        (library / "a").mkdir()
        (library / "a" / "__init__.py").write_text('"""Package."""')
        (library / "a" / "z.py").write_text('"""Shared."""')
        (library / "c.py").write_text('"""Shared."""')
        found = documents()
        assert found == {"a.__init__": "Package.", "a.z": "Shared.", "b": "Own."}
        assert list(found) == ["a.__init__", "a.z", "b"]

    @pytest.mark.parametrize("folder", ["site-packages", "test", "idlelib", "pydoc_data", "a-b"])
    def test_skipped_folders(self, library: Path, folder: str) -> None:
        (library / folder).mkdir()
        (library / folder / "x.py").write_text('"""Skipped."""')
        (library / "kept.py").write_text('"""Kept."""')
        assert documents() == {"kept": "Kept."}

    def test_identity_changes_with_the_sources(self, library: Path) -> None:
        (library / "a.py").write_text('"""A."""\n')
        first = builtin_identity("train")
        assert first == builtin_identity("train") != builtin_identity("evaluation")
        (library / "b.py").write_text('"""B."""\n')
        second = builtin_identity("train")
        os.utime(library / "a.py", ns=(0, 0))
        third = builtin_identity("train")
        (library / "c.py").symlink_to("nowhere.py")  # as some distributions leave them
        assert len({first, second, third, builtin_identity("train")}) == 4

    @pytest.mark.parametrize("source", [b"def (:", b"\x00", b"\xff\xfe"])
    def test_files_that_do_not_parse_are_skipped(self, library: Path, source: bytes) -> None:
        (library / "bad.py").write_bytes(source)
        (library / "good.py").write_text('"""Good."""')
        assert documents() == {"good": "Good."}


class TestErrors:
    def test_no_sources(self, library: Path) -> None:
        with pytest.raises(ConfigurationError, match=r"data\.dataset: .*no Python source in"):
            builtin_text("train")

    def test_no_such_folder(self, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(builtin.sysconfig, "get_path", lambda name: str(library / "none"))
        with pytest.raises(ConfigurationError, match="full standard library"):
            builtin_text("evaluation")

    def test_no_topics(self, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
        with pytest.raises(ConfigurationError, match="no module pydoc_data"):
            builtin_text("train")


NESTED = '''
"""module"""
if True:
    class A:
        """A"""
        try:
            def f(self):
                """f"""
        except* ValueError:
            def g(self):
                """g"""
        else:
            async def h(self):
                """h"""
        finally:
            class B:
                """B"""
for _ in ():
    def i():
        """i"""
else:
    def j():
        """j"""
match 1:
    case 1:
        def k():
            """k"""
    case _:
        with x as y, (lambda: 1)() as z:
            def l(argument=lambda: [w for w in y]):
                """l"""
'''


@pytest.mark.skipif(sys.version_info < (3, 11), reason="except* is of Python 3.11")
def test_docstrings_come_in_the_order_of_a_whole_walk(tmp_path: Path) -> None:
    path = tmp_path / "nested.py"
    path.write_text(NESTED)
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    expected = [ast.get_docstring(node) for node in ast.walk(ast.parse(NESTED)) if isinstance(node, kinds)]
    assert list(builtin._docstrings(path)) == expected
    assert sorted(expected) == ["A", "B", *"fghijkl", "module"]
