"""Events of a stream are those of the `openai` package's types, also where only texts were put in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.choices import Piece, Service
from orchestrator.generation import Token
from orchestrator.openai_api import Origin, Replies, chat_replies, completion_replies
from orchestrator.openai_replies import event
from orchestrator.tokenizer import load_tokenizer

TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), min_size=1, max_size=8)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "usage": {"stream_options": {"include_usage": True}},
    "ids": {"return_token_ids": True},
}


class Nothing:
    """A generator that is never asked."""

    ready = True
    context_length = 128
    vocab_size = 320


@pytest.fixture(scope="module")
def service(byte_level_folder: Path) -> Service:
    # quotes in the name are where putting in texts could go wrong
    never_asked: Any = Nothing()
    return Service(never_asked, load_tokenizer(str(byte_level_folder)), name='"text":"","content":""')


def replies_to(service: Service, endpoint: str, options: dict[str, Any]) -> Replies:
    body = {"model": service.name, "stream": True, "n": 2, **options}
    if endpoint == "chat":
        body["messages"] = [{"role": "user", "content": "To be?"}]
        return chat_replies(service, body, Origin("x", 1))
    return completion_replies(service, {**body, "prompt": "To be"}, Origin("x", 1))


@given(texts=TEXTS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_events_are_byte_for_byte_the_chunks(
    service: Service, endpoint: str, options: dict[str, Any], texts: list[str]
) -> None:
    events, chunks = replies_to(service, endpoint, options), replies_to(service, endpoint, options)
    for position, text in enumerate([*texts, "end"]):
        for index in (0, 1):
            piece = Piece(index, Token(60), text, position, "length" if position == len(texts) else None)
            made = b"".join(map(event, chunks.chunks(piece)))
            assert events.events(piece) == made
            assert all(json.loads(part.removeprefix(b"data: ")) for part in made.split(b"\n\n") if part)
