"""Trees of Kubernetes objects with comments in them, and their YAML."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.scalarstring import DoubleQuotedScalarString, LiteralScalarString

_WIDTH = 118  # of a comment, with its indentation
_PLAIN = re.compile(r"[A-Za-z/][A-Za-z0-9._/@-]*")
_WORDS = frozenset({"true", "false", "null", "yes", "no", "on", "off", "y", "n"})

Tree = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Noted:
    """A value with a comment that stands above its key: one text, or a text for each line."""

    value: Any
    comment: str | tuple[str, ...]


def plain(tree: Any) -> Any:
    """The tree as a program sees it: no comments, only dicts, lists and scalars."""
    if isinstance(tree, Noted):
        return plain(tree.value)
    if isinstance(tree, Mapping):
        return {key: plain(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [plain(value) for value in tree]
    return tree


def to_yaml(tree: Mapping[str, Any], heading: str = "") -> str:
    """One document, `heading` as a comment above it."""
    yaml = YAML()
    yaml.width = 4096  # a long value stays on its line
    stream = io.StringIO()
    yaml.dump(_commented(tree, 0), stream)
    return "".join(f"{line}\n" for line in _lines(heading, 0)) + stream.getvalue()


def _commented(value: Any, indent: int) -> Any:
    if isinstance(value, Noted):
        value = value.value
    if isinstance(value, Mapping):
        found = CommentedMap()
        for name, member in value.items():
            key = _quoted(name)
            found[key] = _commented(member, indent + 2)
            if isinstance(member, Noted):
                comment = "\n".join(line.removeprefix("# ") for line in _lines(member.comment, indent))
                found.yaml_set_comment_before_after_key(key, before=comment, indent=indent)
        return found
    if isinstance(value, list | tuple):
        # the items of a list stand under their key, so their own keys are where a mapping's would be
        return CommentedSeq(_commented(member, indent) for member in value)
    if isinstance(value, str):
        return LiteralScalarString(value) if _is_block(value) else _quoted(value)
    return value


def _is_block(text: str) -> bool:
    """Whether text of several lines can stand as it is: no escapes, and a first space would be indentation."""
    lines = text.split("\n")
    return len(lines) > 1 and text[0].isprintable() and text[0] != " " and all(line.isprintable() for line in lines)


def _quoted(text: str) -> str:
    """In quotes unless every reader takes it for text anyway: to one of YAML 1.1, 0:30 is a number and no is false."""
    return text if _PLAIN.fullmatch(text) and text.lower() not in _WORDS else DoubleQuotedScalarString(text)


def _lines(comment: str | tuple[str, ...], indent: int) -> list[str]:
    texts = (comment,) if isinstance(comment, str) else comment
    width = _WIDTH - indent - 2  # options of commands are not taken apart at their hyphens
    return [f"# {line}" for text in texts if text for line in textwrap.wrap(text, width, break_on_hyphens=False)]
