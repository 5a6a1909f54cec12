"""Where the batches of this user are found again: a folder of links to journals, with a lock for each.

STATE/batches/ID.batch   a link to the journal beside the output; the journal itself where there is no output
STATE/batches/ID.lock    locked by the process that works on the batch; a byte in it asks that process to cancel

STATE is $XDG_STATE_HOME/stagecraft, by default ~/.local/state/stagecraft.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestrator.batches.journal import SUFFIX, JournalError
from orchestrator.state_folder import state_folder


class KnownBatches:
    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder or state_folder() / "batches"

    def journal_path(self, batch: str, output: Path | None) -> Path:
        """Where a new batch has its journal. Raises JournalError when the folder cannot be used."""
        with self._usable():
            return self._link(batch) if output is None else output.with_name(output.name + SUFFIX)

    def remember(self, batch: str, journal: Path) -> None:
        link = self._link(batch)
        if link != journal:
            with self._usable():
                link.unlink(missing_ok=True)
                link.symlink_to(journal.absolute())

    def find(self, reference: str) -> Path | None:
        """The journal of a batch by its id, its output, or its own path; None if there is none."""
        path = Path(reference)
        beside = path.with_name(path.name + SUFFIX) if path.name else path
        for candidate in (*([path] if path.suffix == SUFFIX else []), beside, self._link(path.name)):
            if candidate.is_file():
                return candidate.resolve()
        return None

    def journals(self) -> Iterator[Path]:
        """All that are still there, in the order of their names; links to journals that are gone are removed."""
        if not self._folder.is_dir():
            return
        for link in sorted(self._folder.glob(f"*{SUFFIX}")):
            if link.is_file():
                yield link.resolve()
            elif link.is_symlink():
                link.unlink(missing_ok=True)

    @contextmanager
    def working_on(self, batch: str) -> Iterator[bool]:
        """False if another process works on the batch; else nobody else does until the block ends."""
        with self._usable():
            lock = self._lock(batch).open("ab")
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            lock.truncate(0)
            yield True

    def ask_to_cancel(self, batch: str) -> None:
        """Tells the process that works on the batch."""
        self._lock(batch).write_bytes(b"c")

    def is_cancel_wanted(self, batch: str) -> bool:
        return self._lock(batch).stat().st_size > 0

    def _link(self, batch: str) -> Path:
        return self._folder / f"{batch}{SUFFIX}"

    def _lock(self, batch: str) -> Path:
        return self._folder / f"{batch}.lock"

    @contextmanager
    def _usable(self) -> Iterator[None]:
        """The folder is there in the block; JournalError if it cannot be."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            yield
        except OSError as error:
            raise JournalError(
                f"cannot use {self._folder}: {error.strerror or error}; name another folder in XDG_STATE_HOME"
            ) from None
