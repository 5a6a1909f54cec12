"""Quantities: the notation of Kubernetes for cores, bytes and devices."""

from __future__ import annotations

from contextlib import suppress
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knative.resources.quantities import parse_count, parse_cpus, parse_memory_bytes, parse_quantity


@pytest.mark.parametrize(
    ("text", "cores"), [("500m", 0.5), ("2", 2.0), (2, 2.0), (0.25, 0.25), ("1.5", 1.5), ("100u", 0.0001), ("0", 0.0)]
)
def test_cpus(text: object, cores: float) -> None:
    assert parse_cpus(text) == pytest.approx(cores)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1Gi", 1 << 30),
        ("1.5Ki", 1536),
        ("128974848", 128974848),
        ("129e6", 129_000_000),
        ("129M", 129_000_000),
        ("1E", 10**18),
        ("2k", 2000),
        ("1100m", 2),
        (1024, 1024),
    ],
)
def test_memory_rounds_up_to_whole_bytes(text: object, size: int) -> None:
    assert parse_memory_bytes(text) == size


@pytest.mark.parametrize("text", ["", "1GB", "one", "1 Gi", "0x10", "1e", "--1", "1gi", "٣", True, None, [], "1" * 99])
def test_what_is_no_quantity_is_refused_with_the_form(text: object) -> None:
    with pytest.raises(ValueError, match="quantity"):
        parse_quantity(text)


@pytest.mark.parametrize("text", ["10E", "1e999", "10Ei", "99999999999999999999"])
def test_a_quantity_that_fits_no_64_bits_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"2\^63-1"):
        parse_quantity(text)


def test_negative_amounts_and_parts_of_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        parse_memory_bytes("-1Gi")
    with pytest.raises(ValueError, match="whole numbers"):
        parse_count("500m")


@given(st.integers(-(2**63) + 1, 2**63 - 1))
def test_a_whole_number_is_itself(number: int) -> None:
    assert parse_quantity(str(number)) == Decimal(number)


@given(st.text(max_size=20))
def test_any_text_is_a_quantity_or_a_value_error(text: str) -> None:
    with suppress(ValueError):
        assert parse_quantity(text).is_finite()
