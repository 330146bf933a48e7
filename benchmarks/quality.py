"""Perplexity of every reference model and scheme, by this project's methods, the original and other tools.

    python benchmarks/quality.py --reference FOLDER
    python benchmarks/quality.py --reference FOLDER --ablation
    python benchmarks/quality.py --reference FOLDER --rows llama-w3a16 --windows 3 4

Every row of ``results.json`` in the reference folder is quantized from the same calibration tokens to the same bits and
groups. ``paper`` has the settings written in that file, which the original ran with; ``best`` is
``configs/best/<scheme>.yaml``; the others are baselines, without a training epoch. Figures of other tools are those of
``benchmarks/peers.py`` where it has run, otherwise of the reference folder. ``--windows`` calibrates on other windows,
random ones by seed, of the same token stream: settings that suit only the given windows would show. Finished runs are
not repeated. What was measured is kept in ``benchmarks/quality.json``, where a new run replaces an old one of its name;
the tables of ``benchmarks/quality.md`` are made from that file.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from omniquant_pl.compare.recipes import RECIPES, Case, Settings
from omniquant_pl.spec import ActivationSpec, Scheme, WeightSpec

ROOT = Path(__file__).parent.parent
HEAD = """# Quality

    python benchmarks/quality.py --reference FOLDER

Perplexity of reference models of 3.4 million parameters (`outliers`: the same function, rescaled so that a few
channels are 6 to 40 times larger), every tool calibrated on the same 64 x 256 tokens to the same bits and groups,
measured on 160 windows of 256 other tokens. *Paper* has the settings that the original ran with; *best* is
`configs/best/SCHEME.yaml`, measured in bfloat16 as it calibrates, which changes full precision by less than 0.01 %;
RTN, SmoothQuant, AWQ and GPTQ are this project's, without an epoch. The models are tiny: a
lead below 0.5 % may be luck.
"""
PAGE = ROOT / "benchmarks" / "quality.md"
KEPT = ROOT / "benchmarks" / "quality.json"

Row = dict[str, Any]
Results = dict[str, dict[str, Any]]
"""Perplexities and seconds of runs by their folder below ``--runs``, for example ``paper/llama-w3a16``."""


def settings_of(method: str, row: Row) -> Settings | None:
    """Return what ``compare`` sets for a method, ``None`` if it cannot do the row."""
    weight_bits, activation_bits = row["bits"]
    activations = None if activation_bits == 16 else ActivationSpec(activation_bits)
    scheme = Scheme(WeightSpec(weight_bits, row["group_size"]), activations)
    settings = RECIPES[method].settings(Case(scheme, row["model"].partition("-")[0]))
    if isinstance(settings, str):
        return None
    return settings | ({"trainer.precision": "bf16-mixed"} if method == "best" else {})


def paper(row: Row) -> Settings:
    """Return the published settings, and for how long the original ran with them."""
    settings = settings_of("paper", row)
    assert settings is not None
    return settings | {"trainer.max_epochs": row["epochs"]}


RUNS = ("smoothquant", "awq", "gptq", "paper", "best")
"""The methods of ``compare`` that are run; rounding to nearest is measured beside each of them."""


LINEAR: Settings = {"model.learning": {"schedule": {"decay": "linear"}}}
SEARCH: Settings = {
    "model.transform": {"lr": 5e-3, "initial": "awq", "mlp": True},
    "model.clipping": {"lr": 1e-2, "search": True},
}
OPTIONS: dict[str, Settings] = {
    "window of 2": {"model.objective": {"window": {"blocks": 2}}},
    "learned rounding, linear decay": LINEAR | {"model.rounding": {"method": "learned"}},
    "GPTQ rounding": {"model.rounding": {"method": "gptq"}},
    "AWQ start": SEARCH,
    "divergence at the last block": {"model.objective": {"output_loss": "kl"}},
    "warm-up 10 %, cosine decay": {"model.learning": {"schedule": {"warmup": 0.1, "decay": "cosine"}}},
    "8 samples a step, rates x 3": {"data.batch_size": 8, "model.clipping": {"lr": 3e-2}},
    "best state": {"trainer.callbacks": [{"class_path": "omniquant_pl.callbacks.KeepBestState"}]},
    "rotation": {"model.rotation": {}},
}
"""What each option of ``configs/beyond/`` changes of the paper's settings."""

ABLATED: dict[str, tuple[str, ...]] = {
    "llama-w2a16g64": tuple(OPTIONS),
    "llama-outliers-w4a4": ("window of 2", "learned rounding, linear decay", "AWQ start", "rotation"),
}
"""The rows that options are measured on alone, and which."""

WITHOUT: dict[str, Settings] = {
    "learned rounding": {"model.rounding": {"method": "nearest"}},
    "divergence at the last block": {"model.objective": {"output_loss": "mse"}},
    "linear decay": {"model.learning": {"schedule": {"decay": "none"}}},
    "transformation": {"model.transform": None},
    "clipping search": {"model.clipping.search": False},
    "bfloat16 products": {"trainer.precision": "32-true"},
}
"""What the best settings are without one of their options."""


def scheme_of(row: Row) -> str:
    """Return the name of the row's scheme, for example ``w2a16g64``."""
    return str(row["name"]).removeprefix(f"{row['model']}-")


def rows_of(reference: Path) -> list[Row]:
    """Return the original's rows, and those that only other tools have been run on."""
    content = json.loads((reference / "results.json").read_text())
    rows: list[Row] = content["original"]
    known = {row["name"] for row in rows}
    like = {scheme_of(row): row for row in rows if row["model"] == "llama"}
    for name in sorted({peer["name"] for peer in content["peers"]} - known):
        model, _, scheme = name.rpartition("-")
        rows.append(like[scheme] | {"name": name, "model": model, "perplexity": None, "seconds": None})
    return rows


def command(row: Row, settings: Settings, reference: Path, folder: Path, config: Path | None) -> list[str]:
    """Return the command line of a run."""
    weight_bits, activation_bits = row["bits"]
    common = {
        "model.path": reference / "models" / row["model"],
        "model.weights.bits": weight_bits,
        "model.weights.group_size": row["group_size"],
        "model.activations": None if activation_bits == 16 else {"bits": activation_bits},
        "data.dataset": reference / "calibration.npy",
        "data.samples": 64,
        "data.sequence_length": 256,
        "data.evaluation": [str(reference / "evaluation.npy")],
        "trainer.default_root_dir": folder,
        "trainer.accelerator": "cpu",
        "export.format": None,
    }
    flags = [f"--{key}={_text(value)}" for key, value in (common | settings).items()]
    presets = [] if config is None else [f"--config={config}"]
    return [sys.executable, str(ROOT / "train.py"), "fit", *presets, *flags]


def _text(value: Any) -> str:
    return str(value) if isinstance(value, Path | str) else json.dumps(value)


def stream_of(reference: Path, runs: Path) -> Path:
    """Write the calibration tokens as one stream, from which windows are drawn by seed."""
    path = runs / "stream.npy"
    if not path.is_file():
        runs.mkdir(parents=True, exist_ok=True)
        np.save(path, np.load(reference / "calibration.npy").reshape(-1))
    return path


def measure(row: Row, settings: Settings, reference: Path, folder: Path, config: Path | None = None) -> None:
    """Run a method on a row, unless that has been done."""
    if result(folder) is None:
        print(folder, flush=True)
        subprocess.run(command(row, settings, reference, folder, config), check=True, stdout=subprocess.DEVNULL)


def result(folder: Path) -> dict[str, float] | None:
    """Perplexities and seconds of a finished run, ``None`` of any other."""
    path = folder / "metrics.json"
    if not path.is_file():
        return None
    metrics = json.loads(path.read_text())
    perplexity = metrics["perplexity"]["evaluation"]
    if "quantized" not in perplexity:
        return None
    return {**perplexity, "seconds": metrics["seconds"]["calibration"]}


def keep(runs: Path) -> tuple[Results, list[Row]]:
    """Add what has been run to what is kept, and return all results and those of other tools."""
    kept = json.loads(KEPT.read_text())
    folders = {path.parent.relative_to(runs).as_posix(): path.parent for path in runs.rglob("metrics.json")}
    new = {name: found for name, folder in folders.items() if (found := result(folder)) is not None}
    peers = runs / "peers" / "peers.json"
    if peers.is_file():
        entries = [*kept["peers"], *json.loads(peers.read_text())]
        kept["peers"] = list({(entry["name"], entry["peer"]): entry for entry in entries}.values())
    kept["runs"] = dict(sorted({**kept["runs"], **new}.items()))
    KEPT.write_text(json.dumps(kept, indent=1) + "\n")
    return kept["runs"], kept["peers"]


def peers_of(reference: Path, own: list[Row]) -> dict[tuple[str, str], float]:
    """Perplexities of other tools by row and tool."""
    entries = [*json.loads((reference / "results.json").read_text())["peers"], *own]
    return {
        (entry["name"], _tool(entry["peer"])): entry["perplexity"]
        for entry in entries
        if entry.get("perplexity") is not None
    }


def _tool(peer: str) -> str:
    """Return the tool without its version, which differs between files."""
    words = peer.partition(",")[0].split()
    return " ".join(word for word in words if not word[0].isdigit())


def quality_table(rows: list[Row], peers: dict[tuple[str, str], float], results: Results) -> list[str]:
    """Lines of the table of all methods."""
    tools = sorted({tool for _, tool in peers})
    head = ["model, scheme", "full precision", "RTN", "SmoothQuant", "AWQ", "GPTQ", *tools, "original", "paper", "best"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        found = {method: results.get(f"{method}/{row['name']}") for method in RUNS}
        own = {method: result for method, result in found.items() if result is not None}
        if not own:
            continue
        any_run = next(iter(own.values()))
        cells = [any_run["full_precision"], any_run["round_to_nearest"]]
        cells += [own[m]["quantized"] if m in own else None for m in ("smoothquant", "awq", "gptq")]
        cells += [peers.get((row["name"], tool)) for tool in tools]
        cells.append(row["perplexity"])
        cells += [own[m]["quantized"] if m in own else None for m in ("paper", "best")]
        lines.append(f"| {row['name']} | " + " | ".join(_shown(cell) for cell in cells) + " |")
    return lines


def seconds_table(rows: list[Row], results: Results) -> list[str]:
    """Lines of the table of calibration times."""
    lines = ["| model, scheme | original | paper | best |", "|---|---|---|---|"]
    for row in rows:
        own = [results.get(f"{method}/{row['name']}") for method in ("paper", "best")]
        if any(own):
            cells = [row["seconds"], *(None if found is None else found["seconds"] for found in own)]
            lines.append(f"| {row['name']} | " + " | ".join("" if c is None else f"{c:.0f}" for c in cells) + " |")
    return lines


def ablations(row: Row) -> dict[str, tuple[Settings, bool]]:
    """Settings of the ablation's runs by name, and whether they change the best preset or the paper's settings."""
    alone = {name: (paper(row) | OPTIONS[name], False) for name in ABLATED[row["name"]]}
    return alone | {f"best without {name}": (settings, True) for name, settings in WITHOUT.items()}


def windows_table(rows: list[Row], results: Results) -> list[str]:
    """Lines of the table of other calibration windows."""
    lines = ["| model, scheme, seed of the windows | original, given windows | paper | best |", "|---|---|---|---|"]
    for row in rows:
        seeds = [name.partition("@")[2] for name in results if name.startswith(f"best/{row['name']}@")]
        for seed in seeds:
            own = [results.get(f"{method}/{row['name']}@{seed}") for method in ("paper", "best")]
            cells = [row["perplexity"], *(None if found is None else found["quantized"] for found in own)]
            lines.append(f"| {row['name']}, {seed} | " + " | ".join(map(_shown, cells)) + " |")
    return lines


def ablation_table(row: Row, results: Results) -> list[str]:
    """Lines of the table of one row's ablation."""
    lines = [f"| {row['name']} | perplexity | s |", "|---|---|---|"]
    names = {method: f"{method}/{row['name']}" for method in ("paper", "best")}
    names |= {name: _ablation_run(row, name) for name in ablations(row)}
    for name, run in names.items():
        found = results.get(run)
        if found is not None:
            label = f"paper + {name}" if name in OPTIONS else name
            lines.append(f"| {label} | {found['quantized']:.2f} | {found['seconds']:.0f} |")
    return lines


def _ablation_run(row: Row, name: str) -> str:
    return f"ablation/{row['name']}/" + re.sub(r"\W+", "-", name)


def page(rows: list[Row], peers: dict[tuple[str, str], float], results: Results) -> str:
    """Return the text of ``quality.md``."""
    tables = [ablation_table(row, results) for row in rows if row["name"] in ABLATED]
    windows = windows_table(rows, results)
    parts = [
        HEAD,
        "\n".join(quality_table(rows, peers, results)),
        "## Time\n\nSeconds of calibration, one thread of a shared machine: good for an order of magnitude only.",
        "\n".join(seconds_table(rows, results)),
        *(("## Other calibration windows", "\n".join(windows)) if len(windows) > 2 else ()),
        "## Ablation\n\n    python benchmarks/quality.py --reference FOLDER --ablation",
        *("\n".join(table) for table in tables if len(table) > 4),
    ]
    return "\n\n".join(parts) + "\n"


def _best_config(row: Row) -> Path:
    return ROOT / "configs" / "best" / f"{scheme_of(row)}.yaml"


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def main() -> None:
    """Run what is missing and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, required=True, help="folder with results.json, models/ and tokens")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "quality")
    parser.add_argument("--rows", nargs="*", help="names of rows; all by default")
    parser.add_argument("--methods", nargs="*", default=list(RUNS), choices=RUNS, metavar="METHOD")
    parser.add_argument(
        "--ablation", action="store_true", help="what each option buys, on the rows that ablation names"
    )
    parser.add_argument("--options", nargs="*", help="names of the ablation's runs; all by default")
    parser.add_argument("--windows", type=int, nargs="*", default=[], help="seeds of other calibration windows")
    options = parser.parse_args()
    reference = options.reference.resolve()
    rows = rows_of(reference)
    chosen = [row for row in rows if options.rows is None or row["name"] in options.rows]
    for row in chosen:
        for method in options.methods:
            settings = paper(row) if method == "paper" else settings_of(method, row)
            if settings is not None:
                folder = options.runs / method / row["name"]
                for seed in options.windows:
                    other = {"seed_everything": seed, "data.dataset": stream_of(reference, options.runs)}
                    measure(row, settings | other, reference, folder.with_name(f"{folder.name}@{seed}"))
                if not options.windows:
                    measure(row, settings, reference, folder)
    for row in chosen if options.ablation else ():
        for name, (settings, is_best) in ablations(row).items() if row["name"] in ABLATED else ():
            if options.options is not None and name not in options.options:
                continue
            folder = options.runs / _ablation_run(row, name)
            measure(row, settings, reference, folder, _best_config(row) if is_best else None)
    results, peers = keep(options.runs)
    PAGE.write_text(page(rows, peers_of(reference, peers), results))


if __name__ == "__main__":
    main()
