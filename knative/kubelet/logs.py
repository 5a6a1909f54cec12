"""Log files: folder/POD/N.log for the Nth restart of a pod. As in a cluster, the present run and the one before."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

_RUNS_KEPT = 2
_GONE_PODS_KEPT = 50
_TAIL_BYTES = 16 << 10


def start_log(folder: Path, run: int) -> Path:
    """The file for run number `run`, after deleting those too old to keep."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{run - _RUNS_KEPT}.log").unlink(missing_ok=True)
    return folder / f"{run}.log"


def runs(folder: Path) -> list[Path]:
    """The files of a pod's runs, oldest first."""
    files = [file for file in folder.glob("*.log") if file.stem.isdecimal()]
    return sorted(files, key=lambda file: int(file.stem))


def last_lines(file: Path, count: int = 1) -> list[str]:
    """The last non-empty lines; none if there is no such file."""
    with contextlib.suppress(OSError), file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - _TAIL_BYTES))
        lines = stream.read().decode(errors="replace").splitlines()
        return [line.rstrip() for line in lines if line.strip()][-count:]
    return []


class GonePods:
    """Keeps the logs of the pods that went last, deletes those of earlier ones."""

    def __init__(self) -> None:
        self._folders: list[Path] = []

    def add(self, folder: Path) -> None:
        self._folders.append(folder)
        for old in self._folders[:-_GONE_PODS_KEPT]:
            shutil.rmtree(old, ignore_errors=True)
        del self._folders[:-_GONE_PODS_KEPT]
