"""Finds and loads the compiled kernels of csrc/ through ctypes.

The libraries stand in the package folder under their plain names and know nothing of Python or
torch. A machine that could not build them runs the torch defaults.
"""

import ctypes
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import omniquant_pl

__all__ = ["ABI_VERSION", "I32", "I64", "POINTER", "SUFFIX", "declare", "find", "load"]

ABI_VERSION = 3  # OMNIQUANT_ABI_VERSION in csrc/include/omniquant.h

POINTER = ctypes.c_void_p
I32 = ctypes.c_int32
I64 = ctypes.c_int64

_LOGGER = logging.getLogger(__name__)
SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")


def find(stem: str, folders: Sequence[str] | None = None) -> Path | None:
    """Look for a library in the package.

    Args:
        stem: file name without its platform suffix.
        folders: where to look; by default the package's folders, of which an editable
            installation has two.

    Returns:
        Its path, or None where it was not built.
    """
    for folder in omniquant_pl.__path__ if folders is None else folders:
        path = Path(folder) / f"{stem}{SUFFIX}"
        if path.is_file():
            return path
    return None


def load(stem: str, folders: Sequence[str] | None = None) -> ctypes.CDLL | None:
    """Load a library and compare its interface version with ours.

    Args:
        stem: `libomniquant` or `libomniquant_cuda`.
        folders: where to look, as in `find`.

    Returns:
        The library; None where it is absent, unloadable or of another version, after one log line.
    """
    path = find(stem, folders)
    if path is None:
        _LOGGER.info("%s is not built, its operators run on torch's kernels", stem)
        return None
    try:
        library = ctypes.CDLL(str(path))
        version = declare(library, f"{stem.removeprefix('lib')}_abi_version", [], I32)()
    except (OSError, AttributeError) as error:
        _LOGGER.warning("%s cannot be loaded: %s", path, error)
        return None
    if version != ABI_VERSION:
        _LOGGER.warning("%s has interface %d, not %d: rebuild it", path, version, ABI_VERSION)
        return None
    return library


def declare(library: ctypes.CDLL, name: str, arguments: Sequence[Any], result: Any = None) -> Any:
    """Give a C function its types.

    Args:
        library: where it is exported.
        name: its symbol.
        arguments: ctypes types of its arguments.
        result: ctypes type of its result; None for void.

    Returns:
        The function. Calls of it release the interpreter lock.

    Raises:
        AttributeError: the library has no such symbol.
    """
    function = getattr(library, name)
    function.argtypes = list(arguments)
    function.restype = result
    return function
