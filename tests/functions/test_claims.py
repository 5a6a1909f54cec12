"""Claims: written, read, spent and swept, in a folder and in an object store."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from functions.claims import ClaimLost, Claims
from functions.contract.errors import ClaimsUnavailable, EventTooLarge, InvalidEvent

NAMES = [f"{number:032x}" for number in range(1, 5)]
MANY = 1 << 20


@pytest.fixture(params=["folder", "store"])
def claims(request: pytest.FixtureRequest, tmp_path: Path) -> Claims:
    return Claims(str(tmp_path / "claims") if request.param == "folder" else f"memory://claims-{time.time_ns()}")


def test_a_claim_is_read_until_it_is_spent(claims: Claims) -> None:
    dataref = claims.write(NAMES[0], [b"so", bytearray(b" much")])
    assert claims.read(dataref, MANY) == b"so much"
    claims.spend(dataref)
    claims.spend(dataref)
    assert claims.read(dataref, MANY) is None


def test_a_claim_written_again_is_whole_again(claims: Claims) -> None:
    dataref = claims.write(NAMES[0], [b"first"])
    claims.spend(dataref)
    assert claims.write(NAMES[0], [b"second"]) == dataref
    assert claims.read(dataref, MANY) == b"second"


def test_what_was_never_there_is_lost_and_not_spent(claims: Claims) -> None:
    missing = claims.write(NAMES[0], [b"x"])[:-32] + NAMES[1]
    claims.spend(missing)
    with pytest.raises(ClaimLost):
        claims.read(missing, MANY)


def test_a_claim_over_the_limit_is_not_read(claims: Claims) -> None:
    with pytest.raises(EventTooLarge, match="has 100 bytes, this stage takes 99"):
        claims.read(claims.write(NAMES[0], [b"x" * 100]), 99)


@pytest.mark.parametrize(
    "change",
    [
        lambda ref: ref[:-32] + "../../etc/passwd",
        lambda ref: ref[:-32] + "..",
        lambda ref: ref + "/",
        lambda ref: ref[:-33] + "-other/" + NAMES[0],
        lambda ref: "http://169.254.169.254/" + NAMES[0],
        lambda ref: NAMES[0],
        lambda ref: "",
    ],
)
def test_nothing_but_claims_is_read_or_spent(claims: Claims, change: Callable[[str], str]) -> None:
    dataref = change(claims.write(NAMES[0], [b"x"]))
    with pytest.raises(InvalidEvent, match="no claim in"):
        claims.read(dataref, MANY)
    with pytest.raises(InvalidEvent, match="no claim in"):
        claims.spend(dataref)


def test_sweep_removes_old_claims_and_nothing_else(tmp_path: Path) -> None:
    claims = Claims(f"file://{tmp_path}")
    for name in NAMES[:3]:
        claims.write(name, [b"x"])
    claims.spend(f"{tmp_path.as_uri()}/{NAMES[1]}")
    unfinished, foreign = tmp_path / f"{NAMES[3]}.abc_1.part", tmp_path / "notes.txt"
    for path in (unfinished, foreign):
        path.write_bytes(b"x")
    for path in (tmp_path / NAMES[0], tmp_path / NAMES[1], unfinished, foreign):
        os.utime(path, (time.time() - 100, time.time() - 100))
    assert claims.sweep(50) == 3
    assert {path.name for path in tmp_path.iterdir()} == {NAMES[2], "notes.txt"}


def test_sweep_of_a_store(claims: Claims) -> None:
    dataref = claims.write(NAMES[0], [b"x"])
    assert claims.sweep(3600) == 0
    assert claims.sweep(-1) == 1
    with pytest.raises(ClaimLost):
        claims.read(dataref, MANY)


def test_a_folder_that_is_not_mounted_is_no_lost_claim(tmp_path: Path) -> None:
    with pytest.raises(ClaimsUnavailable, match="is not there"):
        Claims(str(tmp_path / "claims")).read(f"{(tmp_path / 'claims').as_uri()}/{NAMES[0]}", MANY)


def test_a_folder_that_cannot_be_written_says_so_and_holds_no_halves(tmp_path: Path) -> None:
    (tmp_path / "claims").write_text("a file")
    with pytest.raises(ClaimsUnavailable, match="cannot be written"):
        Claims(str(tmp_path / "claims")).write(NAMES[0], [b"x"])
    assert [path.name for path in tmp_path.iterdir()] == ["claims"]
