"""Takes the pictures of the documentation: a calibration in a terminal, and its report in a browser.

    python scripts/screenshots.py docs/images

Needs tmux and chromium. Calibrates the embedded model in a temporary folder, looks at the terminal while a block
learns, and at the report when the run is finished. Further flags are handed on to the calibration.
"""

from __future__ import annotations

import argparse
import io
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.text import Text

_TRAIN = Path(__file__).parents[1] / "train.py"
_FIT = ["fit", "--config", "w4a4.yaml"]
_COLUMNS, _ROWS = 165, 14
_FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"),
    *("--disable-component-update", "--disable-sync", "--hide-scrollbars"),
]


def tmux(*arguments: str) -> str:
    """Run a command of a tmux server of its own."""
    command = ["tmux", "-L", "screenshots", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def calibrate(folder: Path, arguments: list[str]) -> str:
    """Calibrate in a terminal, and return what it shows, colours included, while the third block learns."""
    command = f"{shlex.join([sys.executable, str(_TRAIN), *arguments])}; touch finished"
    size = ["-x", str(_COLUMNS), "-y", str(_ROWS)]
    tmux("new-session", "-d", *size, "-c", str(folder), f"{command}; sleep 5")
    shown = ""
    while not (folder / "finished").exists():
        screen = tmux("capture-pane", "-e", "-p")
        if "block 2, epoch" in screen:
            shown = screen
        time.sleep(0.5)
    return f"$ python train.py {shlex.join(arguments)}\n{shown.strip()}"


def photograph(page: Path, output: Path, width: int, height: int, dark: bool = False) -> None:
    """Take a picture of a page, in as few colours as it needs."""
    with tempfile.TemporaryDirectory() as profile:
        scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
        options = [f"--user-data-dir={profile}", f"--window-size={width},{height}", scheme, f"--screenshot={output}"]
        command = ["chromium", *_FLAGS, *options, f"file://{page}"]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
    Image.open(output).convert("RGB").quantize(256).save(output, optimize=True)


def draw_terminal(screen: str, output: Path) -> None:
    """Draw what a terminal has shown."""
    console = Console(record=True, width=_COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi(screen))
    svg = console.export_svg(title="")
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)  # from the network
    match = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    assert match is not None
    width, height = (round(float(size)) for size in match.groups())
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "terminal.html"
        page.write_text(f'<body style="margin:0;background:transparent">{svg}', encoding="utf-8")
        photograph(page, output, width, height)


def frame_as_telephone(report: Path, page: Path) -> None:
    """Write a page that shows another as wide as a telephone: browsers have no window that narrow."""
    page.write_text(
        f'<body style="margin:0"><iframe src="file://{report}" width="390" height="1100" '
        'style="border:0;display:block"></iframe>',
        encoding="utf-8",
    )


def main() -> None:
    """Take all pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    known, further = parser.parse_known_args()
    output: Path = known.output
    output.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp())
    try:
        draw_terminal(calibrate(folder, [*_FIT, *further]), output / "terminal.png")
        report = folder / "runs" / "w4a4" / "report.html"
        photograph(report, output / "report-light.png", 1240, 1500)
        photograph(report, output / "report-dark.png", 1240, 1500, dark=True)
        frame_as_telephone(report, folder / "phone.html")
        photograph(folder / "phone.html", output / "report-phone.png", 390, 1100)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
