"""Lines of texts to score, as events for the first stage. Reads as `orchestrator.batches.reader` does: flat memory.

{"text": "To be, or not to be"}
{"tokens": [84, 111, 32], "custom_id": "a"}
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np

from functions.contract.events import TENSORS
from functions.contract.scoring import SCORE, Ask, Texts
from knative.eventing.attributes import problem_of
from knative.eventing.event import CloudEvent
from orchestrator.batches.events import request_id
from orchestrator.batches.lines import (
    CUSTOM_ID_CHARACTERS_MAX,
    LINE_BYTES_MAX,
    BadLine,
    Request,
    too_long,
    what_is_broken,
)
from orchestrator.batches.reader import InputReader
from orchestrator.tokenizer import TokenizerError

TOKEN_BOUND = 1 << 31  # token ids are int32

Encode = Callable[[str], list[int]]


class _Bad(Exception):
    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class TextReader(InputReader):
    """Lines of `stream` as requests for `model`, whose `line` is the data of a score event. `encode` makes token ids
    of a text; None where nobody said how."""

    def __init__(self, stream: BinaryIO, model: str, ask: Ask, encode: Encode | None) -> None:
        super().__init__(stream, model)
        self._name = model
        self._ask = ask
        self._encode = encode

    def _parsed(self, raw: bytes) -> Request | BadLine | None:
        if not raw.strip():
            return None
        if len(raw) > LINE_BYTES_MAX:
            return too_long(self._line)
        line: dict[str, Any] = {}
        try:
            line = _object(raw)
            tokens = self._tokens(line)
            custom_id = _custom_id(line.get("custom_id", f"line-{self._line:06}"))
        except _Bad as error:
            named = line.get("custom_id")
            return BadLine(self._line, named if isinstance(named, str) else None, error.code, str(error))
        body = Texts((len(tokens),), np.array(tokens, dtype=np.int32), None, self._ask).to_body()
        return Request(self._line, custom_id, self._name, b"".join(body))

    def _tokens(self, line: dict[str, Any]) -> list[int]:
        if ("text" in line) == ("tokens" in line):
            raise _Bad("missing_required_parameter", 'must have either "text" or "tokens"')
        tokens = line["tokens"] if "tokens" in line else self._encoded(line["text"])
        if not isinstance(tokens, list) or not all(type(one) is int and 0 <= one < TOKEN_BOUND for one in tokens):
            raise _Bad("invalid_type", "tokens must be a list of token ids (whole numbers from 0)")
        if not tokens:
            raise _Bad("invalid_value", "has no tokens; there is nothing to score")
        return tokens

    def _encoded(self, text: Any) -> list[int]:
        if not isinstance(text, str):
            raise _Bad("invalid_type", "text must be a text")
        if self._encode is None:
            raise _Bad("no_tokenizer", "has text; say with --tokenizer which model's tokenizer cuts it into tokens")
        try:
            return self._encode(text)
        except TokenizerError as error:
            raise _Bad("invalid_value", str(error)) from None


def score_event(batch: str, request: Request) -> CloudEvent:
    """The same for every sending of a request. Raises InvalidEvent for a model that cannot be an attribute."""
    attributes = {
        "specversion": "1.0",
        "type": SCORE,
        "source": f"/stagecraft/batches/{batch}",
        "id": request_id(batch, request.custom_id),
        "datacontenttype": TENSORS,
        "batch": batch,
        "customid": request.custom_id,
        "model": request.model,
        "stage": "0",
    }
    return CloudEvent.build(attributes, request.line)


def _object(raw: bytes) -> dict[str, Any]:
    try:
        line = json.loads(raw)
    except RecursionError:
        raise _Bad("invalid_json_line", "nested too deeply") from None
    except json.JSONDecodeError as error:
        raise _Bad("invalid_json_line", f"not valid JSON: {what_is_broken(error)}") from None
    except ValueError as error:  # not UTF-8
        raise _Bad("invalid_json_line", f"not valid JSON: {error}") from None
    if not isinstance(line, dict):
        raise _Bad("invalid_json_line", "not a JSON object")
    return line


def _custom_id(value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= CUSTOM_ID_CHARACTERS_MAX:
        raise _Bad("invalid_type", f"custom_id must be a text of 1 to {CUSTOM_ID_CHARACTERS_MAX} characters")
    if problem := problem_of("customid", value):
        raise _Bad("invalid_value", problem)
    return value
