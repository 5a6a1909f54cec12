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
PROCESSORS = ("default", "avx2", "avx512")
"""The kinds that there is code for, each able to do what those before it can; names and order are torch's, which also
keeps to the one that ATEN_CPU_CAPABILITY names."""

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


def processor() -> str | None:
    """The one of PROCESSORS that the library computes for; None where there is no library.

    Sums of floats are taken in another order for each, so two replicas give the same bits where it is the same."""
    library = kernels()
    return None if library is None else PROCESSORS[library.processor()]


def use_at_most(newest: str) -> None:
    """From now on the library does without what only newer processors can."""
    if (library := kernels()) is not None:
        library.use_at_most(PROCESSORS.index(newest))


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
        library = _declared(ctypes.CDLL(str(path)))
    except OSError as error:
        return f"the kernels cannot be loaded: {error}"
    newest = os.environ.get("ATEN_CPU_CAPABILITY")
    if newest in PROCESSORS:
        library.use_at_most(PROCESSORS.index(newest))
    return library


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    library.paged_attention.argtypes = [_POINTER, _POINTER]
    library.packed_linear.argtypes = [_POINTER]
    library.fused_blocks.argtypes = [_POINTER]
    packers = (library.pack_linear, library.pack_linear_int8)
    for pack in packers:
        pack.argtypes = [_POINTER, _POINTER, _INT64, _INT64, _INT64, ctypes.c_int32]
    library.rms_norm.argtypes = [_POINTER, _POINTER, _POINTER, _INT64, _INT64, _INT64, ctypes.c_float]
    library.processor.argtypes, library.processor.restype = [], ctypes.c_int
    library.use_at_most.argtypes = [ctypes.c_int]
    called = (library.paged_attention, library.packed_linear, library.fused_blocks, library.rms_norm)
    for function in (*called, *packers, library.use_at_most):
        function.restype = None
    return library
