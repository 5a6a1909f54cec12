"""What requests say about themselves in headers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from orchestrator.generation import GenerationError
from orchestrator.request_terms import NO_TERMS, Given, current_terms, seeded, under


def given(headers: Mapping[str, Sequence[str]], body: bytes = b"", left_s: float | None = None) -> Given:
    return Given("/openai/v1/completions", headers, body, 100.0, left_s)


@pytest.mark.parametrize(
    ("headers", "left_s", "deadline_s"),
    [
        ({}, None, None),
        ({}, 7, 107),
        ({"x-request-timeout-ms": ["1500"]}, None, 101.5),
        ({"x-request-timeout-ms": ["1500"]}, 1, 101),
        ({"x-request-timeout-ms": ["1500"]}, 7, 101.5),
    ],
)
def test_the_shorter_time_counts(headers: Mapping[str, Sequence[str]], left_s: float, deadline_s: float) -> None:
    assert given(headers, left_s=left_s).read().deadline_s == deadline_s


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "1e3", "ten", "²", "9" * 10, "9" * 5000])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(GenerationError, match="x-request-timeout-ms") as caught:
        given({"x-request-timeout-ms": [text]}).read()
    assert caught.value.status == 400


@pytest.mark.parametrize("name", ["x-request-timeout-ms", "idempotency-key"])
def test_a_header_given_twice_is_refused(name: str) -> None:
    with pytest.raises(GenerationError):
        given({name: ["1", "1"]}).read()


@pytest.mark.parametrize("name", ["authorization", "x-api-key", "api-key"])
def test_keys_count_within_their_senders_credentials(name: str) -> None:
    def digest(*values: str) -> str:
        key = given({"idempotency-key": ["a"], name: values}).read().key
        assert key is not None
        return key.digest

    assert digest("one") == digest("one")
    assert len({digest(), digest("one"), digest("other"), digest("one", "other")}) == 4


def test_the_endpoint_counts() -> None:
    one = given({"idempotency-key": ["a"]})
    other = Given("/openai/v1/chat/completions", one.headers, b"", 100.0, None)
    assert one.read().key != other.read().key


def test_a_seed_comes_out_of_the_key_where_none_is_given() -> None:
    terms = given({"idempotency-key": ["a"]}).read()
    assert terms.key is not None
    assert seeded({"prompt": "x"}, terms) == {"prompt": "x", "seed": terms.key.seed}
    assert seeded({"seed": None}, terms) == {"seed": terms.key.seed}
    assert seeded({"seed": 0}, terms) == {"seed": 0}
    assert len({seeded({}, terms, place)["seed"] for place in range(5)}) == 5
    assert seeded({"prompt": "x"}, NO_TERMS) == {"prompt": "x"}


def test_terms_are_those_of_the_request_at_hand() -> None:
    assert current_terms() == NO_TERMS
    with under(given({}, left_s=5)):
        assert current_terms().deadline_s == 105
    assert current_terms() == NO_TERMS
