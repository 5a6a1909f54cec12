"""Where the platforms of this user on this machine are found: one small file for each, in a folder of the user's own.

    RUNTIME/NAME.json    who runs it, where it listens, where its control API is
    RUNTIME/XXXX.sock    the control API
    RUNTIME/lock         held for a moment by whoever reads or writes

RUNTIME is $STAGECRAFT_RUNTIME_DIR, else $XDG_RUNTIME_DIR/stagecraft, else stagecraft-UID in the temporary folder.
A platform that was killed leaves its files behind; whoever looks next removes them.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import secrets
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from knative.errors import KnativeError, NotFound, Unavailable

SOCKET_PATH_BYTES_MAX = 107  # sun_path of Linux has 108, one is for the zero at the end
NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,38}[a-z0-9])?")  # a DNS label, and short
PROBE_TIMEOUT_S = 1.0


class RegistryError(KnativeError):
    """The runtime folder cannot be used or a name cannot be had; another value of an option heals it."""

    status = 409


@dataclass(frozen=True, slots=True)
class Entry:
    """A running platform. `started_at` is RFC 3339."""

    name: str
    socket: Path
    pid: int
    url: str
    folder: Path
    started_at: str


def runtime_folder() -> Path:
    """The folder, made if need be. Raises RegistryError when it belongs to others or others may look into it."""
    folder = _wanted_folder()
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        seen = folder.lstat()
    except OSError as error:
        raise RegistryError(f"cannot use the runtime folder {folder}: {_why(error)}; {_HEAL}") from None
    if not stat.S_ISDIR(seen.st_mode) or seen.st_uid != os.geteuid():
        raise RegistryError(f"the runtime folder {folder} is not a folder of this user; {_HEAL}")
    if seen.st_mode & 0o077:
        raise RegistryError(f"others may use the runtime folder {folder}; `chmod 700 {folder}`, or {_HEAL}")
    return folder


def socket_path() -> Path:
    """A path for a new control socket. Raises RegistryError when the folder's path is too long for one."""
    path = runtime_folder() / f"{secrets.token_hex(4)}.sock"
    length = len(os.fsencode(path))
    if length > SOCKET_PATH_BYTES_MAX:
        raise RegistryError(
            f"{path} has {length} bytes, the path of a socket may have {SOCKET_PATH_BYTES_MAX}; "
            "name a shorter folder in STAGECRAFT_RUNTIME_DIR"
        )
    return path


def check_free(name: str) -> None:
    """Raises RegistryError when `name` cannot name a platform, or a running one has it."""
    if not NAME.fullmatch(name):
        raise RegistryError(f"{name!r} cannot name a platform: lower-case letters, digits and -, at most 40")
    with _locked() as folder:
        _check_untaken(folder, name)


@contextmanager
def published(entry: Entry) -> Iterator[None]:
    """The platform can be found as long as the block runs. Its control API has to answer by then.

    Raises RegistryError when another one has the name."""
    with _locked() as folder:
        _check_untaken(folder, entry.name)
        path = folder / f"{entry.name}.json"
        draft = folder / f"{entry.name}.draft"
        draft.write_text(json.dumps(asdict(entry), default=str))
        draft.replace(path)
    try:
        yield
    finally:
        with _locked() as folder:
            if _read(path) == entry:
                path.unlink(missing_ok=True)


def entries() -> list[Entry]:
    """The platforms that run, by name. What is left of others is removed."""
    with _locked() as folder:
        found = [_living(path) for path in sorted(folder.glob("*.json"))]
    return [entry for entry in found if entry is not None]


def find(name: str | None = None) -> Entry:
    """The platform called `name`, or the only one. Raises NotFound and Unavailable, which say what to do."""
    running = {entry.name: entry for entry in entries()}
    names = ", ".join(running)
    if not running:
        raise Unavailable(
            "no platform runs on this machine; start one with `stagecraft local start` or `stagecraft up`"
        )
    if name is not None:
        if name not in running:
            raise NotFound(f"no platform called {name!r} runs on this machine; there is: {names}")
        return running[name]
    if len(running) > 1:
        raise Unavailable(f"several platforms run: {names}; choose with --platform NAME")
    return next(iter(running.values()))


_HEAL = "name another folder in STAGECRAFT_RUNTIME_DIR"


def _wanted_folder() -> Path:
    named = os.environ.get("STAGECRAFT_RUNTIME_DIR")
    if named:
        return Path(named).absolute()
    xdg = os.environ.get("XDG_RUNTIME_DIR")
    # after su and sudo it still names the folder of the user before
    if xdg and os.path.isdir(xdg) and os.stat(xdg).st_uid == os.geteuid():
        return Path(xdg) / "stagecraft"
    return Path(tempfile.gettempdir()) / f"stagecraft-{os.geteuid()}"


@contextmanager
def _locked() -> Iterator[Path]:
    """The runtime folder, nobody else in it."""
    folder = runtime_folder()
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def _check_untaken(folder: Path, name: str) -> None:
    other = _living(folder / f"{name}.json")
    if other is not None:
        raise RegistryError(
            f"a platform called {name!r} runs already (pid {other.pid}, {other.url}); choose another name with --name"
        )


def _living(path: Path) -> Entry | None:
    """The entry in `path` if its platform runs, else nothing, and the files are removed."""
    entry = _read(path)
    if entry is not None and _process_exists(entry.pid) and _accepts(entry.socket):
        return entry
    path.unlink(missing_ok=True)
    if entry is not None and entry.socket.parent == path.parent:
        entry.socket.unlink(missing_ok=True)
    return None


def _read(path: Path) -> Entry | None:
    try:
        data = json.loads(path.read_text())
        entry = Entry(**{**data, "socket": Path(data["socket"]), "folder": Path(data["folder"])})
        return entry if isinstance(entry.pid, int) else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _process_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _accepts(path: Path) -> bool:
    """Whether someone listens at the socket; one too busy to accept at once does."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(PROBE_TIMEOUT_S)
        try:
            probe.connect(str(path))
        except TimeoutError:
            return True
        except OSError as error:
            return error.errno == errno.EAGAIN
    return True


def _why(error: OSError) -> str:
    return error.strerror or str(error)
