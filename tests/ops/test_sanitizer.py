"""The host's kernels under the compiler's sanitizers, over odd and hostile sizes in exact buffers."""

from __future__ import annotations

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = Path(__file__).parent / "sanitizer"
KERNELS = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
COMPILER = shutil.which("g++")
# Unoptimised: that compiles fastest. Without versions per processor: those are chosen before a sanitizer starts.
FLAGS = ["-std=c++17", "-O0", "-g1", "-pthread", "-fopenmp-simd", "-Wno-psabi", "-fno-sanitize-recover=all"]
INCLUDES = [f"-I{ROOT / 'csrc' / folder}" for folder in ("common", "cpu", "include")]
X86 = '#include <immintrin.h>\nint main() { return __builtin_cpu_supports("avx512bf16"); }'

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="g++ is not installed"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="guarded pages are made as Linux makes them"),
]


def compile_all(sources: list[Path], sanitizers: str, folder: Path) -> Path:
    """The program of these sources, two compilers at a time."""
    probe = subprocess.run(
        [COMPILER, "-x", "c++", "-", "-o", folder / "probe"], input=X86, text=True, capture_output=True, check=False
    )
    flags = [*FLAGS, f"-fsanitize={sanitizers}", *INCLUDES, *([] if probe.returncode else ["-DOMNIQUANT_X86"])]

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        subprocess.run([COMPILER, *flags, "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    program = folder / "program"
    subprocess.run([COMPILER, *flags, *objects, "-o", program], check=True)
    return program


def run(program: Path) -> str:
    result = subprocess.run([program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-5000:]
    return result.stdout


@pytest.mark.slow
def test_kernels_stay_inside_of_their_buffers(tmp_path: Path) -> None:
    """AddressSanitizer and UBSan see no overrun and nothing undefined; the results are those of plain loops."""
    program = compile_all([*KERNELS, SOURCES / "cases.cpp"], "address,undefined", tmp_path)
    assert int(run(program)) > 2000


def test_threads_share_work_without_races(tmp_path: Path) -> None:
    """ThreadSanitizer sees no race, and every piece is done once."""
    sources = [ROOT / "csrc" / "cpu" / "parallel.cpp", SOURCES / "threads.cpp"]
    program = compile_all(sources, "thread", tmp_path)
    assert run(program) == "done\n"
