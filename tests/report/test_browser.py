"""The page in a real browser: it renders without errors, on a telephone too, and has two colour schemes."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Finished

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium or google-chrome in PATH")

FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--virtual-time-budget=2000"),
]

# Shown in a frame as wide as a telephone; what the frame's page looks like is written where the test can read it.
FRAME = """<!doctype html><iframe id="frame" width="390" height="844" srcdoc="{page}"></iframe><pre id="found"></pre>
<script>
document.getElementById("frame").onload = event => {{
  const page = event.target.contentDocument, root = page.documentElement, view = page.defaultView
  const pictures = [...page.querySelectorAll("figure svg")].map(svg => svg.getBoundingClientRect())
  document.getElementById("found").textContent = JSON.stringify({{
    width: root.scrollWidth,
    pictures: pictures.map(box => [Math.round(box.width), Math.round(box.height)]),
    numbers: [...page.querySelectorAll("data")].map(each => [each.dataset.key, each.value]),
    ink: view.getComputedStyle(page.querySelector("figure svg text")).fill,
    paper: view.getComputedStyle(page.body).backgroundColor,
  }})
}}
</script>"""


@pytest.fixture(scope="module")
def browse(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[str, list[str]]]:
    """Opens a page, and returns its document as the browser has it and what its console says."""

    def browse(page: str, *flags: str) -> tuple[str, list[str]]:
        folder = tmp_path_factory.mktemp("browser")
        (folder / "page.html").write_text(page, encoding="utf-8")
        command = [str(CHROMIUM), *FLAGS, *flags, f"--user-data-dir={folder / 'profile'}", "--dump-dom"]
        done = subprocess.run(
            [*command, f"file://{folder / 'page.html'}"], capture_output=True, text=True, timeout=60, check=True
        )
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    return browse


def test_errors_would_be_seen(browse: Callable[..., tuple[str, list[str]]]) -> None:
    _, console = browse("<!doctype html><script>missing()</script>")
    assert any("missing is not defined" in line for line in console)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_page_on_a_telephone(browse: Callable[..., tuple[str, list[str]]], finished: Finished, dark: bool) -> None:
    scheme = "--blink-settings=preferredColorScheme=" + ("0" if dark else "1")
    document, console = browse(FRAME.format(page=html.escape(finished.page)), scheme)
    assert console == []
    match = re.search(r'<pre id="found">(.*?)</pre>', document, re.DOTALL)
    assert match is not None
    found = json.loads(html.unescape(match[1]))
    assert found["width"] <= 390
    assert len(found["pictures"]) == finished.page.count("<svg")
    assert all(width > 300 and height > 150 for width, height in found["pictures"])
    ink, paper = (sum(map(int, re.findall(r"\d+", found[name])[:3])) / 3 for name in ("ink", "paper"))
    assert (paper < 60 and ink > 120) if dark else (paper > 230 and ink < 140)
    for key, value in found["numbers"]:
        expected = finished.metrics
        for part in key.split("."):
            expected = expected[int(part)] if isinstance(expected, list) else expected[part]
        assert json.loads(value) == expected
