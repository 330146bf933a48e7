"""What importing the package costs, and that its version is one number."""

import subprocess
import sys
from importlib.metadata import version

import omniquant_pl


def test_version_is_the_distribution_s() -> None:
    assert omniquant_pl.__version__ == version("omniquant-pl")


def test_import_is_light() -> None:
    """A fresh interpreter: heavy packages stay out, and so does torch itself."""
    heavy = {"bitsandbytes", "datasets", "lightning", "lm_eval", "torch", "transformers"}
    code = "import sys, omniquant_pl; print(*sys.modules, sep='\\n')"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "omniquant_pl" in loaded
    assert heavy.isdisjoint(loaded)


def test_operators_start_no_cuda() -> None:
    code = "import torch, omniquant_pl.ops; print(torch.cuda.is_initialized())"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout.strip() == "False"


def test_callbacks_are_part_of_the_package() -> None:
    code = "import omniquant_pl.callbacks as c; print(c.__name__, c.__spec__.parent)"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout.split() == ["omniquant_pl.callbacks", "omniquant_pl.callbacks"]
