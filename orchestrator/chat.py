"""A conversation as the text that the model was trained on, by the checkpoint's own Jinja template.

Templates come with checkpoints, so they are foreign code: they run in Jinja's immutable sandbox. What a template may
use follows https://huggingface.co/docs/transformers/chat_templating_writing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = Mapping[str, Any]

_PROBE = "a1b2c3"


class ChatTemplateError(Exception):
    """The template refused the conversation (roles in the wrong order, say) or is itself broken."""


class ChatTemplate:
    """Compiled once. Whether it takes a message's content as text or as a list of parts is found by trying."""

    def __init__(self, source: str, special: Mapping[str, str]) -> None:
        self._special = dict(special)
        try:
            self._template = _environment().from_string(source)
        except Exception as error:  # of Jinja, and for some that are nested too deep of Python
            raise ChatTemplateError(f"the checkpoint's chat template cannot be compiled: {error}") from None
        self.takes_text = self._shows_probe(_PROBE)
        self.takes_parts = self._shows_probe([{"type": "text", "text": _PROBE}])

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """`messages` have `role` and `content` (text, or a list of {"type": "text", "text": ...}).

        Raises ChatTemplateError with the template's own words."""
        return self._render([self._fitted(message) for message in messages], add_generation_prompt)

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        try:
            return self._template.render(
                **self._special,
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:  # a template is code that came with the checkpoint: it may raise anything
            raise ChatTemplateError(f"the chat template refused the messages: {error}") from None

    def _fitted(self, message: Message) -> Message:
        content = message.get("content")
        if isinstance(content, str) and self.takes_parts and not self.takes_text:
            return {**message, "content": [{"type": "text", "text": content}]}
        if isinstance(content, list) and not self.takes_parts:
            return {**message, "content": "".join(part["text"] for part in content)}
        return message

    def _shows_probe(self, content: object) -> bool:
        """A template that does not expect `content` fails, leaves it out or prints it as a Python value."""
        try:
            text = self._render([{"role": "user", "content": content}], True)
        except ChatTemplateError:
            return False
        return _PROBE in text and "'type'" not in text


class _Generation(Extension):
    """{% generation %} marks what the assistant says, for training; here its body is simply kept."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own declaration)

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_keep"), [], [], body).set_lineno(line)

    def _keep(self, caller: Any) -> str:
        return str(caller())


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    # Jinja's own filter escapes for HTML
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
