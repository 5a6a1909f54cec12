"""Claim check: data too large for a broker lie in a file or object, and the event names it (extension `dataref`).

A claim is written before the event that names it is sent, and read by the stage that gets that event. It is *spent* by
the stage after that: an event made from it has then been accepted by the broker, so nobody needs it any more. A spent
claim leaves an empty file, because the broker may deliver an event once more after it has done so: the stage sees that
the work is done, and not that something is lost. Empty files, and claims that nobody came for, are removed by age.

Extension: https://github.com/cloudevents/spec/blob/main/cloudevents/extensions/dataref.md
"""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

import structlog

from functions.contract.errors import ClaimsUnavailable, EventTooLarge, InvalidEvent
from functions.contract.frames import Buffer

_NAME = re.compile(r"[0-9a-f]{32}")
_PART = ".part"  # of a claim that is being written
_OURS = re.compile(rf"{_NAME.pattern}(\.\w+\{_PART})?")

T = TypeVar("T")

log = structlog.get_logger()


class ClaimLost(Exception):
    """There is no such claim: removed by age, or it lies where this stage does not look."""


class _Place(Protocol):
    """Where claims lie. Raises FileNotFoundError for a name that is not there, and any other exception for trouble."""

    url: str  # without a slash at its end

    def size_bytes(self, name: str) -> int: ...
    def read(self, name: str) -> bytearray: ...
    def write(self, name: str, parts: Sequence[Buffer]) -> None: ...
    def ages(self, now_s: float) -> Iterable[tuple[str, float]]: ...
    def remove(self, name: str) -> None: ...


class Claims:
    """`location` is a folder, or a URL that fsspec opens. Calls block; they raise ClaimsUnavailable for trouble that
    may pass. Raises ValueError and ImportError for a URL that fsspec cannot open."""

    def __init__(self, location: str) -> None:
        path = location.removeprefix("file://")
        self._place: _Place = _Folder(Path(path)) if "://" not in path else _Store(location)

    def write(self, name: str, parts: Sequence[Buffer]) -> str:
        """The `dataref` of the new claim. Writing the same name again replaces it, spent or not."""
        with self._readable("written"):
            self._place.write(name, parts)
        return f"{self._place.url}/{name}"

    def read(self, dataref: str, bytes_max: int) -> bytearray | None:
        """None for a claim that is spent. Raises ClaimLost, EventTooLarge, and InvalidEvent for what is no claim."""
        name = self._name(dataref)
        with self._readable("read"):
            size_bytes = self._place.size_bytes(name)
            if size_bytes > bytes_max:
                raise EventTooLarge(
                    f"the claim {dataref} has {size_bytes} bytes, this stage takes {bytes_max} (STAGE_BODY_BYTES_MAX)"
                )
            return (self._place.read(name) or None) if size_bytes else None

    def spend(self, dataref: str) -> None:
        """Its bytes go; that there was such a claim stays known. One that is not there stays away."""
        name = self._name(dataref)
        with suppress(ClaimLost), self._readable("spent"):
            if self._place.size_bytes(name):
                self._place.write(name, ())

    def sweep(self, age_s: float) -> int:
        """Removes what has not been written to for so long, and returns how many that were."""
        count = 0
        with self._readable("removed"):
            for name, found_s in list(self._place.ages(time.time())):
                if found_s > age_s and _OURS.fullmatch(name):
                    with suppress(FileNotFoundError):  # another replica sweeps too
                        self._place.remove(name)
                        count += 1
        return count

    def _name(self, dataref: str) -> str:
        """Nothing but claims is ever touched, whatever an event asks for."""
        place, _, name = dataref.rpartition("/")
        if place != self._place.url or not _NAME.fullmatch(name):
            raise InvalidEvent(
                f"dataref {dataref[:200]!r} is no claim in {self._place.url}; give all stages the same STAGE_CLAIMS"
            )
        return name

    @contextmanager
    def _readable(self, done: str) -> Iterator[None]:
        try:
            yield
        except EventTooLarge:
            raise
        except FileNotFoundError as error:
            raise ClaimLost(str(error)) from None
        except Exception as error:  # each file system has its own
            raise ClaimsUnavailable(
                f"a claim in {self._place.url} cannot be {done}: {error or type(error).__name__}; look at STAGE_CLAIMS"
            ) from error


class _Folder:
    """A file is whole or not there, whatever ends the process, and on the disk before its event is sent."""

    def __init__(self, path: Path) -> None:
        self._path = path.absolute()
        self.url = self._path.as_uri()

    def size_bytes(self, name: str) -> int:
        return self._there(lambda: os.stat(self._path / name).st_size)

    def read(self, name: str) -> bytearray:
        return self._there(lambda: bytearray((self._path / name).read_bytes()))

    def write(self, name: str, parts: Sequence[Buffer]) -> None:
        self._path.mkdir(parents=True, exist_ok=True)
        descriptor, draft = tempfile.mkstemp(prefix=f"{name}.", suffix=_PART, dir=self._path)
        try:
            with open(descriptor, "wb") as file:
                file.writelines(parts)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, self._path / name)
        except BaseException:
            with suppress(OSError):
                os.unlink(draft)
            raise
        if parts:
            _sync_folder(self._path)

    def ages(self, now_s: float) -> Iterator[tuple[str, float]]:
        if not self._path.is_dir():
            return
        with os.scandir(self._path) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    yield entry.name, now_s - entry.stat().st_mtime

    def remove(self, name: str) -> None:
        os.unlink(self._path / name)

    def _there(self, call: Callable[[], T]) -> T:
        """A volume that is not mounted is no lost claim."""
        try:
            return call()
        except FileNotFoundError:
            if not self._path.is_dir():
                raise NotADirectoryError(f"{self._path} is not there") from None
            raise


class _Store:
    """An object store, or any other file system of fsspec's. Objects of these are whole or not there."""

    def __init__(self, url: str) -> None:
        import fsspec

        self.url = url.rstrip("/")
        self._files: Any
        self._files, self._path = fsspec.core.url_to_fs(self.url)

    def size_bytes(self, name: str) -> int:
        self._files.invalidate_cache()  # other processes write here
        return int(self._files.info(f"{self._path}/{name}")["size"])

    def read(self, name: str) -> bytearray:
        return bytearray(self._files.cat_file(f"{self._path}/{name}"))

    def write(self, name: str, parts: Sequence[Buffer]) -> None:
        self._files.pipe_file(f"{self._path}/{name}", b"".join(parts))

    def ages(self, now_s: float) -> Iterator[tuple[str, float]]:
        self._files.invalidate_cache()
        for path, facts in self._files.find(self._path, detail=True).items():
            with suppress(NotImplementedError):  # a store that knows no ages: nothing there is swept
                modified = facts.get("mtime") or facts.get("LastModified") or self._files.modified(path)
                seconds = modified.timestamp() if hasattr(modified, "timestamp") else float(modified)
                yield path.rpartition("/")[2], now_s - seconds

    def remove(self, name: str) -> None:
        self._files.rm_file(f"{self._path}/{name}")


def _sync_folder(path: Path) -> None:
    """The name of a new file is durable only with its folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
