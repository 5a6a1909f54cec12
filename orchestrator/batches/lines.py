"""Lines of a batch: input lines read and checked, output lines understood and made. Pure.

An input line is one of OpenAI's (https://platform.openai.com/docs/guides/batch)

    {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": "demo", "prompt": "To be"}}

or a plain one, whose members but custom_id are the body:

    {"prompt": "To be", "max_tokens": 16}
    {"messages": [{"role": "user", "content": "Who is there?"}]}
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from knative.eventing.attributes import problem_of

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
LINE_BYTES_MAX = 4 << 20
CUSTOM_ID_CHARACTERS_MAX = 256
REASON_CHARACTERS_MAX = 300
CANCELLED = "batch_cancelled"  # the code of a request that was not computed since its batch was cancelled

Kind = Literal["completed", "failed", "cancelled"]


@dataclass(frozen=True, slots=True)
class Request:
    """A line that can be sent. `line` is in OpenAI's form, as UTF-8."""

    number: int  # of the line, the first is 1
    custom_id: str
    model: str
    line: bytes


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that is left out. `code` is for programs, `message` for people."""

    number: int
    custom_id: str | None
    code: str
    message: str

    def __str__(self) -> str:
        return f"line {self.number}: {self.message}"

    def to_json(self) -> bytes:
        """As a line of OpenAI's error file; the number of the line is an addition."""
        error = {"code": self.code, "message": str(self), "line": self.number}
        return _dump({"id": f"line-{self.number}", "custom_id": self.custom_id, "response": None, "error": error})


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an output line says of its request."""

    custom_id: str
    kind: Kind
    reason: str = ""  # of a failed one


class OutputLineError(ValueError):
    """Not an output line."""


class _Bad(Exception):
    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def parse_line(number: int, raw: bytes, model: str | None) -> Request | BadLine | None:
    """A line with or without its end; None for a blank one. `model` is the batch's; None: the line has to name one."""
    line: dict[str, Any] = {}
    try:
        if not raw.strip():
            return None
        line = _object(raw)
        if line.keys() & {"method", "url", "body"}:
            return _openai(number, line, raw, model)
        return _plain(number, line, model)
    except _Bad as bad:
        custom_id = line.get("custom_id")
        return BadLine(number, custom_id if isinstance(custom_id, str) else None, bad.code, str(bad))


def too_long(number: int) -> BadLine:
    return BadLine(number, None, "line_too_long", f"longer than the limit of {LINE_BYTES_MAX} bytes")


def duplicate(request: Request, first: int) -> BadLine:
    message = f"custom_id {request.custom_id!r} is that of line {first} already; it must be unique in a batch"
    return BadLine(request.number, request.custom_id, "duplicate_custom_id", message)


def parse_output(line: bytes) -> Outcome:
    """Raises OutputLineError."""
    try:
        data = json.loads(line)
        custom_id, response, error = data["custom_id"], data.get("response"), data.get("error")
        if not isinstance(custom_id, str):
            raise OutputLineError("custom_id is no text")
        custom_id.encode()  # fails for half of a surrogate pair, which JSON can escape and no file can hold
        if error is not None:
            if error.get("code") == CANCELLED:
                return Outcome(custom_id, "cancelled")
            return Outcome(custom_id, "failed", _one_line(error.get("message")))
        if (status := int(response["status_code"])) < 400:
            return Outcome(custom_id, "completed")
        return Outcome(custom_id, "failed", f"answered with {status}: {_said(response.get('body'))}")
    except OutputLineError:
        raise
    except (ValueError, ArithmeticError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise OutputLineError(
            f"not a line of a batch output, which has custom_id and response or error ({type(error).__name__}: {error})"
        ) from None


def what_is_broken(error: json.JSONDecodeError) -> str:
    """What is wrong with the JSON of one line, and where in that line."""
    return f"{error.msg.removesuffix(' at')} at character {error.pos + 1}"  # many of its messages end so


def error_output(id: str, custom_id: str, code: str, message: str) -> bytes:
    """The output line of a request that got no answer."""
    return _dump({"id": id, "custom_id": custom_id, "response": None, "error": {"code": code, "message": message}})


def _said(body: Any) -> str:
    """The message of an error as OpenAI's endpoints answer it."""
    error = body.get("error") if isinstance(body, dict) else None
    return _one_line(error.get("message") if isinstance(error, dict) else None)


def _one_line(message: Any) -> str:
    text = " ".join(message.split()) if isinstance(message, str) else ""
    return text[:REASON_CHARACTERS_MAX] or "no reason is given"


def _object(raw: bytes) -> dict[str, Any]:
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise _Bad("invalid_encoding", f"not UTF-8 at byte {error.start + 1}") from None
    try:
        line = json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        raise _Bad("invalid_json_line", "nested too deeply") from None
    except json.JSONDecodeError as error:
        raise _Bad("invalid_json_line", f"not valid JSON: {what_is_broken(error)}") from None
    except ValueError as error:
        raise _Bad("invalid_json_line", f"not valid JSON: {error}") from None
    if not isinstance(line, dict):
        raise _Bad("invalid_json_line", "not a JSON object")
    return line


def _openai(number: int, line: dict[str, Any], raw: bytes, model: str | None) -> Request:
    missing = [name for name in ("custom_id", "method", "url", "body") if line.get(name) is None]
    if missing:
        raise _Bad("missing_required_parameter", f"without {' and '.join(missing)}")
    if line["method"] != "POST":
        raise _Bad("invalid_method", f"method must be POST, got {_short(line['method'])}")
    if line["url"] not in (CHAT, COMPLETIONS):
        raise _Bad("invalid_url", f"url must be {CHAT} or {COMPLETIONS}, got {_short(line['url'])}")
    if not isinstance(line["body"], dict):
        raise _Bad("invalid_type", f"body must be a JSON object, got {_short(line['body'])}")
    body_model = _model(line["body"], model)
    custom_id = _custom_id(line["custom_id"])
    if line["body"].get("model") is not None:
        return Request(number, custom_id, body_model, raw.strip())  # as it came: numbers keep their digits
    return Request(number, custom_id, body_model, _dump({**line, "body": {**line["body"], "model": body_model}}))


def _plain(number: int, line: dict[str, Any], model: str | None) -> Request:
    questions = [name for name in ("prompt", "messages") if name in line]
    if len(questions) != 1:
        what = (
            "both prompt and messages" if questions else "neither prompt nor messages, nor custom_id, method, url, body"
        )
        raise _Bad("missing_required_parameter", f"has {what}: give one of them")
    body = {name: value for name, value in line.items() if name != "custom_id"}
    body_model = _model(body, model)
    custom_id = _custom_id(line.get("custom_id", f"line-{number:06}"))
    url = CHAT if questions == ["messages"] else COMPLETIONS
    full = {"custom_id": custom_id, "method": "POST", "url": url, "body": {**body, "model": body_model}}
    return Request(number, custom_id, body_model, _dump(full))


def _custom_id(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise _Bad("invalid_type", f"custom_id must be a text that is not empty, got {_short(value)}")
    if len(value) > CUSTOM_ID_CHARACTERS_MAX:
        raise _Bad(
            "invalid_value", f"custom_id has {len(value)} characters, at most {CUSTOM_ID_CHARACTERS_MAX} are taken"
        )
    if problem := problem_of("customid", value):
        raise _Bad("invalid_value", problem)
    return value


def _model(body: dict[str, Any], model: str | None) -> str:
    named = model if body.get("model") is None else body["model"]
    if named is None:
        raise _Bad("missing_required_parameter", "without model; name it in the body, or for all lines with --model")
    if not isinstance(named, str) or not named:
        raise _Bad("invalid_type", f"model must be a text that is not empty, got {_short(named)}")
    if problem := problem_of("model", named):
        raise _Bad("invalid_value", problem)
    if model is not None and named != model:
        raise _Bad(
            "mismatched_model", f"a batch is for one model; this one is for {model!r}, the line for {_short(named)}"
        )
    return named


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _dump(value: Any) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:  # half of a surrogate pair stays escaped, as it came
        return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()
    except ValueError:
        raise _Bad("invalid_json_line", "a number in it is too large for a floating-point number") from None


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")
