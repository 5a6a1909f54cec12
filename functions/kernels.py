"""The compiled kernels of a stage on a CPU (`paged_attention.c`, `packed_linear.c`), where they could be built.

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

_INT64, _POINTER = ctypes.c_int64, ctypes.c_void_p


@cache
def kernels() -> ctypes.CDLL | None:
    """The library, loaded once; None where it is not there, or where STAGECRAFT_NO_KERNELS says so."""
    if os.environ.get("STAGECRAFT_NO_KERNELS"):  # for tests and comparisons
        return None
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_kernels{suffix}")
        if path.exists():
            try:
                return _declared(ctypes.CDLL(str(path)))
            except OSError:  # built for another system
                return None
    return None


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    library.paged_attention.argtypes = [_POINTER, _POINTER]
    library.packed_linear.argtypes = [_POINTER]
    packers = (library.pack_linear, library.pack_linear_int8)
    for pack in packers:
        pack.argtypes = [_POINTER, _POINTER, _INT64, _INT64, _INT64, ctypes.c_int32]
    for function in (library.paged_attention, library.packed_linear, *packers):
        function.restype = None
    return library
