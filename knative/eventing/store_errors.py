"""What can go wrong with the broker's file.

StoreError 500      the file cannot be used, or a call was not carried out: nothing of it was done
└── StoreFull 507   no room; the caller keeps what it has and tries again later
"""

from __future__ import annotations

import errno
import sqlite3
from pathlib import Path

from knative.errors import KnativeError


class StoreError(KnativeError):
    """The text names the file, what happened and what to do."""


class StoreFull(StoreError):
    status = 507


def is_full(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, StoreFull) or _code(error) & 0xFF == sqlite3.SQLITE_FULL


def is_beyond_trust(error: Exception) -> bool:
    """Whether nobody knows any more what the disk holds: an fsync that has failed may "succeed" next, the data lost."""
    code = _code(error)
    return code == sqlite3.SQLITE_IOERR_FSYNC or code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def readable(path: Path, error: Exception) -> StoreError:
    """`error` in words for people."""
    if isinstance(error, StoreError):
        return error
    if is_full(error):
        return StoreFull(f"no room for {path}: make room on its disk; what was accepted is kept")
    if is_beyond_trust(error):
        return StoreError(
            f"{path} cannot be trusted any more ({error}): the store takes and gives nothing further. Check the disk, "
            f'then start again; `sqlite3 {path} ".recover"` shows what can be read'
        )
    if _code(error) & 0xFF == sqlite3.SQLITE_BUSY:
        return StoreError(f"{path} is in use by another program ({error}): end it, or give another path")
    return StoreError(f"{path}: {error or type(error).__name__}")


def _code(error: Exception) -> int:
    return getattr(error, "sqlite_errorcode", 0) or 0  # absent on errors of the binding itself
