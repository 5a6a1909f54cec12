"""Incremental text equals decoding the whole, whatever the tokens and however they are cut."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.text import Detokenizer, StopScanner, TextStream
from orchestrator.tokenizer import Tokenizer, load_tokenizer

TEXTS = ["To be, or not", " leading and  double  spaces ", "naïve café", "你好, 世界", "🙂🙃 mixed 🙂", "\n\ttabs\n"]


@pytest.fixture(scope="module", params=["byte_level_folder", "sentencepiece_folder"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return load_tokenizer(str(request.getfixturevalue(request.param)))


@pytest.fixture(scope="module")
def byte_level(byte_level_folder: Path) -> Tokenizer:
    return load_tokenizer(str(byte_level_folder))


def deltas_of(tokenizer: Tokenizer, ids: list[int], prompt: list[int] | None = None) -> list[str]:
    detokenizer = Detokenizer(tokenizer.decode, prompt or [])
    return [*(detokenizer.push(token) for token in ids), detokenizer.finish()]


@pytest.mark.parametrize("text", TEXTS)
def test_deltas_add_up_to_the_text_and_never_show_half_a_character(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    deltas = deltas_of(tokenizer, ids)
    assert "".join(deltas) == tokenizer.decode(ids) == text
    assert not any("\ufffd" in delta for delta in deltas)


@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=40))
@settings(max_examples=150, deadline=None)
def test_any_text_comes_out_whole(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert "".join(deltas_of(tokenizer, ids)) == tokenizer.decode(ids)


@given(ids=st.lists(st.integers(0, 319), max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_ids_decode_as_the_whole_does_even_garbage(byte_level: Tokenizer, ids: list[int]) -> None:
    assert "".join(deltas_of(byte_level, ids)) == byte_level.decode(ids)


@pytest.mark.parametrize("cut", range(1, 9))
def test_text_after_a_prompt_keeps_its_leading_space(tokenizer: Tokenizer, cut: int) -> None:
    ids = tokenizer.encode("To be, or not to be, that", add_special_tokens=False)
    prompt, answer = ids[:cut], ids[cut:]
    assert tokenizer.decode(prompt) + "".join(deltas_of(tokenizer, answer, prompt)) == tokenizer.decode(ids)


def test_decoding_work_grows_with_the_tokens_not_with_their_square(byte_level: Tokenizer) -> None:
    garbage = byte_level.encode("é", add_special_tokens=False)[:1] * 4096
    for ids in (garbage, byte_level.encode("to be " * 1000), [1] * 4096):
        decoded = 0

        def count(ids: list[int]) -> str:
            nonlocal decoded
            decoded += len(ids)
            return byte_level.decode(ids)

        detokenizer = Detokenizer(count)
        for token in ids:
            detokenizer.push(token)
        detokenizer.finish()
        assert decoded < 16 * len(ids) + 100


def cut_at_stop(text: str, stops: list[str]) -> str:
    """The rule told in the plainest way: read on until some stop text is complete."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))]
    return text


@given(
    pieces=st.lists(st.text("abc", max_size=4), max_size=12),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
@settings(max_examples=500)
def test_stop_texts_cut_the_same_however_the_text_arrives(pieces: list[str], stops: list[str]) -> None:
    scanner = StopScanner(stops)
    shown = "".join(scanner.push(piece) for piece in pieces) + scanner.finish()
    whole = "".join(pieces)
    assert shown == cut_at_stop(whole, stops)
    assert scanner.stopped == any(stop in whole for stop in stops)


def test_what_could_become_a_stop_is_held_back_and_the_rest_is_not() -> None:
    scanner = StopScanner(["STOP"])
    assert scanner.push("go ST") == "go "
    assert scanner.push("ART ") == "START "
    assert scanner.push("S") == ""
    assert scanner.push("TOP and more") == ""
    assert scanner.stopped
    assert scanner.push("never shown") == ""


@given(ids=st.lists(st.integers(0, 319), max_size=40), stops=st.lists(st.sampled_from(["e", " t", "é", "to b"])))
@settings(max_examples=200, deadline=None)
def test_stream_equals_the_whole_text_cut_at_the_stop(byte_level: Tokenizer, ids: list[int], stops: list[str]) -> None:
    stream = TextStream.of(byte_level.decode, stops)
    shown = "".join(stream.push(token) for token in ids) + stream.finish()
    assert shown == cut_at_stop(byte_level.decode(ids), stops)
