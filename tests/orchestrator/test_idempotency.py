"""Keys of requests, and what is kept of those that have ended."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from functions.contract.sampling import SEED_BOUND
from orchestrator.generation import GenerationError
from orchestrator.idempotency import CHARACTERS_MAX, Kept, make_key

PRINTABLE = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), min_size=1, max_size=CHARACTERS_MAX)


def test_the_same_key_names_the_same_generation_in_every_process() -> None:
    key = make_key("8e03978e", ("/openai/v1/completions", "nobody"), b"{}")
    assert key.digest == "05d2a27603d1247194c9ac2c4603d096ef5d4ca747e1e8088e6c55928f368ee3"
    assert 0 <= key.seed < SEED_BOUND
    assert key.tag == key.digest[:32]


def test_quotes_may_be_left_out() -> None:
    assert make_key(r'"a\"b\\c"', (), b"") == make_key(r'a"b\c', (), b"") == make_key(r' a"b\c ', (), b"")


@given(PRINTABLE.filter(lambda text: text == text.strip() and not text.startswith('"')), PRINTABLE, PRINTABLE)
def test_scopes_keep_keys_apart(key: str, one: str, other: str) -> None:
    assert (make_key(key, (one,), b"").digest == make_key(key, (other,), b"").digest) == (one == other)
    assert make_key(key, (one + key,), b"").digest != make_key(key, (one, key), b"").digest


def test_the_body_tells_requests_apart() -> None:
    one, other = (make_key("a", (), body) for body in (b"1", b"2"))
    assert one.digest == other.digest
    assert one.body != other.body


@pytest.mark.parametrize(
    "text", ["", "  ", '""', '"', '"a', '"a"b"', r'"a\n"', '"a";x=1', "a\tb", "schlüssel", "a" * (CHARACTERS_MAX + 1)]
)
def test_what_is_no_key_is_refused(text: str) -> None:
    with pytest.raises(GenerationError, match="Idempotency-Key") as caught:
        make_key(text, (), b"")
    assert caught.value.status == 400


def kept(keep_s: float = 10, count_max: int = 3, bytes_max: int = 100) -> Kept[str]:
    return Kept(keep_s, count_max, bytes_max)


def test_values_are_kept_for_their_time() -> None:
    box = kept()
    box.put("a", "A", 1, now_s=0)
    assert box.get("a", now_s=9.9) == "A"
    assert box.get("a", now_s=10) is None
    assert (len(box), box.bytes) == (0, 0)


def test_the_oldest_go_first_where_there_are_too_many() -> None:
    box = kept()
    for now_s, name in enumerate("abcd"):
        box.put(name, name, 1, now_s)
    assert [box.get(name, 4) for name in "abcd"] == [None, "b", "c", "d"]


def test_the_oldest_go_first_where_they_are_too_large() -> None:
    box = kept()
    box.put("a", "A", 60, 0)
    box.put("b", "B", 30, 1)
    box.put("c", "C", 50, 2)
    assert [box.get(name, 2) for name in "abc"] == [None, "B", "C"]
    box.put("d", "D", 101, 3)
    assert [box.get(name, 3) for name in "bcd"] == ["B", "C", None]


def test_a_value_takes_the_place_of_the_one_before() -> None:
    box = kept()
    box.put("a", "A", 60, 0)
    box.put("a", "B", 70, 5)
    assert box.get("a", 12) == "B"
    assert box.bytes == 70


@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 120), st.integers(0, 5))))
def test_bounds_hold_whatever_is_put_in(puts: list[tuple[str, int, int]]) -> None:
    box, now_s, sizes = kept(), 0, {}
    for name, size_bytes, later_s in puts:
        now_s += later_s
        box.put(name, name, size_bytes, now_s)
        sizes[name] = size_bytes
        here = [name for name in "abcdefgh" if box.get(name, now_s) is not None]
        assert len(box) == len(here) <= 3
        assert box.bytes == sum(sizes[name] for name in here) <= 100
