"""Where platforms are found: who may be found, what is cleaned up, and what people are told."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from knative import registry
from knative.errors import NotFound, Unavailable
from knative.registry import Entry, RegistryError


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "run"
    monkeypatch.setenv("STAGECRAFT_RUNTIME_DIR", str(folder))
    return folder


@contextmanager
def listening(name: str, *, pid: int | None = None) -> Iterator[Entry]:
    """An entry whose socket takes connections."""
    path = registry.socket_path()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        yield Entry(name, path, pid or os.getpid(), "http://127.0.0.1:1", Path("/logs"), "2026-01-01T00:00:00Z")


def ended_process() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


@pytest.mark.usefixtures("runtime")
def test_the_only_platform_needs_no_name() -> None:
    with listening("alone") as entry, registry.published(entry):
        assert registry.find() == registry.find("alone") == entry


@pytest.mark.usefixtures("runtime")
def test_without_a_platform_people_learn_how_to_start_one() -> None:
    with pytest.raises(Unavailable, match=r"no platform runs on this machine; start one with `stagecraft local start`"):
        registry.find()


@pytest.mark.usefixtures("runtime")
def test_of_several_platforms_one_must_be_chosen() -> None:
    with ExitStack() as stack:
        for name in ("b", "a"):
            stack.enter_context(registry.published(stack.enter_context(listening(name))))
        with pytest.raises(Unavailable, match="several platforms run: a, b; choose with --platform NAME"):
            registry.find()
        assert registry.find("b").name == "b"
        with pytest.raises(NotFound, match="no platform called 'c' runs on this machine; there is: a, b"):
            registry.find("c")


def test_nothing_but_the_lock_is_left_at_the_end(runtime: Path) -> None:
    with listening("short") as entry, registry.published(entry):
        assert [path.name for path in runtime.glob("*.json")] == ["short.json"]
    entry.socket.unlink()
    assert [path.name for path in runtime.iterdir()] == ["lock"]


def test_a_platform_whose_process_is_gone_is_cleaned_away(runtime: Path) -> None:
    with listening("killed", pid=ended_process()) as entry:
        with registry.published(entry):
            assert registry.entries() == []
        assert [path.name for path in runtime.iterdir()] == ["lock"]


def test_a_platform_whose_socket_refuses_is_cleaned_away(runtime: Path) -> None:
    """Its process id may belong to another program by now."""
    with listening("killed") as entry:
        pass
    with registry.published(entry):
        assert registry.entries() == []
        assert [path.name for path in runtime.iterdir()] == ["lock"]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"name": 1}', '{"pid": "x"}'])
def test_a_file_that_is_no_entry_is_cleaned_away(runtime: Path, text: str) -> None:
    registry.runtime_folder()
    (runtime / "odd.json").write_text(text)
    assert registry.entries() == []
    assert not (runtime / "odd.json").exists()


def test_an_entry_never_makes_us_remove_files_elsewhere(runtime: Path, tmp_path: Path) -> None:
    registry.runtime_folder()
    precious = tmp_path / "precious"
    precious.touch()
    entry = {"name": "x", "socket": str(precious), "pid": os.getpid(), "url": "", "folder": "", "started_at": ""}
    (runtime / "x.json").write_text(json.dumps(entry))
    assert registry.entries() == []
    assert precious.exists()


@pytest.mark.usefixtures("runtime")
def test_a_name_is_had_once() -> None:
    with listening("mine") as first, registry.published(first), listening("mine") as second:
        with pytest.raises(RegistryError, match=r"a platform called 'mine' runs already.*choose another name"):
            registry.check_free("mine")
        with pytest.raises(RegistryError), registry.published(second):
            pass
        assert registry.find() == first
    registry.check_free("mine")


@pytest.mark.usefixtures("runtime")
def test_the_end_of_a_platform_leaves_its_successor_alone() -> None:
    with listening("mine") as first, listening("mine") as second, ExitStack() as stack:
        ended = stack.enter_context(ExitStack())
        ended.enter_context(registry.published(first))
        first.socket.unlink()  # as if it had been killed
        stack.enter_context(registry.published(second))
        ended.close()
        assert registry.find() == second


@pytest.mark.usefixtures("runtime")
@pytest.mark.parametrize("name", ["", "A", "a/b", "../a", "-a", "a-", "a" * 41, "a b", "a\n"])
def test_a_name_is_a_short_label(name: str) -> None:
    with pytest.raises(RegistryError, match="cannot name a platform"):
        registry.check_free(name)


def test_the_folder_is_for_this_user_only(runtime: Path) -> None:
    assert registry.runtime_folder().stat().st_mode & 0o777 == 0o700
    runtime.chmod(0o755)
    with pytest.raises(RegistryError, match="chmod 700"):
        registry.runtime_folder()


def test_a_link_to_a_folder_is_not_trusted(runtime: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    runtime.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RegistryError, match="not a folder of this user"):
        registry.runtime_folder()


def test_a_path_too_long_for_a_socket_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAGECRAFT_RUNTIME_DIR", str(tmp_path / ("x" * 100)))
    with pytest.raises(RegistryError, match="name a shorter folder in STAGECRAFT_RUNTIME_DIR"):
        registry.socket_path()


def test_by_default_the_folder_lies_in_that_of_the_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STAGECRAFT_RUNTIME_DIR", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert registry.runtime_folder() == tmp_path / "stagecraft"


def test_without_a_session_the_folder_is_named_by_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STAGECRAFT_RUNTIME_DIR", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "absent"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert registry.runtime_folder() == tmp_path / f"stagecraft-{os.geteuid()}"
