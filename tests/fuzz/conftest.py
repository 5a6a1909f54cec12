"""The doors of the fuzzer, opened once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from tools.fuzzing.catalogue import open_door
from tools.fuzzing.door import Door


@pytest.fixture(scope="session")
def door_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Door]]:
    """name -> the door, which stays open until the tests end."""
    opened: dict[str, Door] = {}
    with ExitStack() as stack:

        def get(name: str) -> Door:
            if name not in opened:
                opened[name] = stack.enter_context(closing(open_door(name, Path(tmp_path_factory.mktemp(name)))))
            return opened[name]

        yield get
