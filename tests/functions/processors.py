"""The kernels as they compute on other processors than this one, as far as it can stand in for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from functions import kernels

_THIS = kernels.processor()

KINDS = [
    pytest.param(
        kind,
        marks=pytest.mark.skipif(
            _THIS is not None and rank > kernels.PROCESSORS.index(_THIS), reason=f"this processor is {_THIS}"
        ),
    )
    for rank, kind in enumerate(kernels.PROCESSORS)
]


@contextmanager
def computed_as_on(kind: str) -> Iterator[None]:
    kernels.use_at_most(kind)
    try:
        yield
    finally:
        kernels.use_at_most(_THIS or kind)
