"""The compiled kernels of a stage on a CPU (the C files beside this module), where they could be built.

They are an optional part of the installation: without a C compiler torch computes the same, slower. The threads are
those of torch, whose OpenMP library is in the process already when this one is loaded.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import os
from functools import cache
from pathlib import Path

import torch  # noqa: F401 (its OpenMP library comes first)

NO_KERNELS = "STAGECRAFT_NO_KERNELS"
_INT64, _POINTER = ctypes.c_int64, ctypes.c_void_p


def kernels() -> ctypes.CDLL | None:
    """The library; None where it is not there, or where STAGECRAFT_NO_KERNELS says to do without."""
    found = _found()
    return None if isinstance(found, str) or os.environ.get(NO_KERNELS) else found


def why_no_kernels() -> str | None:
    """Why there is no library; None where there is one."""
    if os.environ.get(NO_KERNELS):
        return f"{NO_KERNELS} is set"
    found = _found()
    return found if isinstance(found, str) else None


@cache
def _found() -> ctypes.CDLL | str:
    """The library, loaded once, or why there is none."""
    paths = [Path(__file__).with_name(f"_kernels{suffix}") for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    path = next(filter(Path.exists, paths), None)
    if path is None:
        return "the kernels are not built; with a C compiler, `python tools/build_kernels.py` builds them"
    try:
        # After torch: the libgomp.so.1 that its wheel brings is in memory by now, and the loader takes that one for
        # ours too. So the threads are the same, and an image without a libgomp of its own will do.
        return _declared(ctypes.CDLL(str(path)))
    except OSError as error:
        return f"the kernels cannot be loaded: {error}"


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    library.paged_attention.argtypes = [_POINTER, _POINTER]
    library.packed_linear.argtypes = [_POINTER]
    library.fused_blocks.argtypes = [_POINTER]
    packers = (library.pack_linear, library.pack_linear_int8)
    for pack in packers:
        pack.argtypes = [_POINTER, _POINTER, _INT64, _INT64, _INT64, ctypes.c_int32]
    library.rms_norm.argtypes = [_POINTER, _POINTER, _POINTER, _INT64, _INT64, _INT64, ctypes.c_float]
    called = (library.paged_attention, library.packed_linear, library.fused_blocks, library.rms_norm)
    for function in (*called, *packers):
        function.restype = None
    return library
