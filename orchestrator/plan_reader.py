"""Reads the nodes that a plan's YAML text is made of, which know their lines, and complains in terms of them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import NoReturn, cast

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode

_TYPES = {
    "tag:yaml.org,2002:str": "text", "tag:yaml.org,2002:int": "a whole number", "tag:yaml.org,2002:null": "nothing",
    "tag:yaml.org,2002:float": "a number with a fraction", "tag:yaml.org,2002:bool": "true or false",
    "tag:yaml.org,2002:seq": "a list", "tag:yaml.org,2002:map": "a mapping", "tag:yaml.org,2002:timestamp": "a date",
}  # fmt: skip
# words that stay the same text for every YAML reader when they stand without quotes
_PLAIN = re.compile(r"(\.{0,2}/)?[A-Za-z][A-Za-z0-9._/@-]*")
_YAML_WORDS = frozenset({"true", "false", "null", "yes", "no", "on", "off", "y", "n"})
_DIGITS = re.compile(r"\d{1,19}")  # so many that no sum of them grows out of hand
_NUMBER = re.compile(r"\d{1,19}(\.\d{0,40})?|\.\d{1,40}")


class PlanError(Exception):
    """The plan cannot be made or used; the text says where (file and line, when read) and what is allowed."""


class PlanReader:
    """`source` is the file's name. Everything raises PlanError with file, line and what is allowed."""

    def __init__(self, source: str) -> None:
        self._source = source

    def compose(self, text: str, required: Sequence[str]) -> Node:
        """The node of the whole text; `required` is what a file needs, should it be empty."""
        try:
            root = YAML(typ="safe", pure=True).compose(text)
        except MarkedYAMLError as error:
            self._syntax_error(text, error)
        except (YAMLError, ValueError, RecursionError) as error:
            reason = str(error).splitlines()[0] if str(error) else "nested too deeply"
            raise PlanError(f"{self._source} is not YAML: {reason}") from None
        if root is None:
            raise PlanError(f"{self._source} is empty; a plan has {listed(required)}")
        return cast(Node, root)

    def fail(self, node: Node, text: str) -> NoReturn:
        raise PlanError(f"{self._source}:{node.start_mark.line + 1}: {text}")

    def fail_if(self, node: Node, text: str | None) -> None:
        if text:
            self.fail(node, text)

    def entries(self, node: Node, what: str, known: Sequence[str], required: Sequence[str]) -> Mapping[str, Node]:
        """The values of a mapping by key."""
        if not isinstance(node, MappingNode):
            self.fail(node, f"{what} is a mapping with {listed(required)}, got {kind_of(node)}")
        found: dict[str, Node] = {}
        for key, value in node.value:
            name = key.value if isinstance(key, ScalarNode) else kind_of(key)
            if name not in known:
                self.fail(key, f"unknown key {name!r} in {what}; known are {listed(known)}")
            if name in found:
                self.fail(key, f"{name} is given twice, first in line {found[name].start_mark.line + 1}; keep one")
            if str(value.tag).endswith(":null"):
                value.start_mark = key.start_mark  # nothing stands where the next thing does, lines further on
            found[name] = value
        missing = [name for name in required if name not in found]
        if missing:
            self.fail(node, f"{what} lacks {listed(missing)}; it needs {listed(required)}")
        return found

    def text(self, node: Node, what: str) -> str:
        if not isinstance(node, ScalarNode) or not str(node.tag).endswith(":str"):
            hint = f'; write it in quotes: "{node.value}"' if isinstance(node, ScalarNode) and node.value else ""
            self.fail(node, f"{what} must be text, got {kind_of(node)}{hint}")
        return str(node.value)

    def whole_number(self, node: Node, what: str, most: int, least: int = 0) -> int:
        plain = isinstance(node, ScalarNode) and str(node.tag).endswith(":int") and _DIGITS.fullmatch(node.value)
        if not plain or not least <= int(node.value) <= most:
            self.fail(node, f"{what} must be a whole number in {least}..{most}, got {kind_of(node)}")
        return int(node.value)

    def decimal(self, node: Node, what: str) -> Decimal:
        """A number as it is written, digit by digit, so that units can be changed without rounding."""
        number = isinstance(node, ScalarNode) and str(node.tag).endswith((":int", ":float"))
        if not number or not _NUMBER.fullmatch(node.value):
            self.fail(node, f"{what} must be a number, such as 5.2, got {kind_of(node)}")
        return Decimal(node.value)

    def day(self, node: Node, what: str) -> str:
        if isinstance(node, ScalarNode) and str(node.tag).endswith(":timestamp"):
            return str(node.value)
        return self.text(node, what)

    def _syntax_error(self, text: str, error: MarkedYAMLError) -> NoReturn:
        mark = error.problem_mark or error.context_mark
        line = mark.line if mark is not None else 0
        lines = text.splitlines()
        if line < len(lines) and "\t" in lines[line]:
            problem = "a tab; YAML is indented with spaces only"
        else:
            problem = "; ".join(str(part) for part in (error.context, error.problem) if part)
            problem = f"not YAML: {problem}"
        raise PlanError(f"{self._source}:{line + 1}: {problem}") from None


def listed(words: Sequence[str]) -> str:
    return ", ".join(words)


def kind_of(node: Node) -> str:
    kind = _TYPES.get(str(node.tag), "a value of another type")
    return f"{kind} ({node.value})" if isinstance(node, ScalarNode) and node.value else kind


def scalar(text: str) -> str:
    """Text as a YAML scalar; quoted unless every reader takes it for text anyway."""
    if _PLAIN.fullmatch(text) and text.lower() not in _YAML_WORDS:
        return text
    return json.dumps(text, ensure_ascii=False)  # what JSON leaves unescaped is printable, so YAML takes it
