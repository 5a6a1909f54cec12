"""YAML and JSON texts as plain values that remember their lines.

Scalars are read as `kubectl` reads them (YAML 1.1 as go-yaml has it: `on` is true, a date is text). Values are those
of JSON: dict with text keys, list, str, int, float, bool, None.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NoReturn

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from knative.errors import ValidationError

_VALUES_MAX = 100_000  # of one document, aliases written out: more is an alias bomb
_DEPTH_MAX = 100
_TAG = "tag:yaml.org,2002:"


@dataclass(frozen=True, slots=True)
class Text:
    """One document of a file. `lines` maps a path ("spec.traffic[0].tag") to the line on which it begins."""

    value: object
    line: int
    lines: Mapping[str, int] = field(default_factory=dict)


def read_yaml(text: str, source: str) -> list[Text]:
    """The documents of a YAML text, empty ones left out. Raises ValidationError with `source` and line."""
    try:
        nodes = [node for node in _reader().compose_all(text) if node is not None]
        found = [_Values(source, line_of(node)).text(node) for node in nodes]
        return [document for document in found if document.value is not None]
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}:{mark.line + 1}" if mark else source
        raise ValidationError([f"{where}: not YAML: {error.problem or error.context}"]) from None
    except YAMLError as error:
        raise ValidationError([f"{source}: not YAML: {str(error).splitlines()[0]}"]) from None
    except RecursionError:
        raise ValidationError([f"{source}: not YAML that can be read: nested too deeply"]) from None
    except (ValueError, AssertionError, IndexError, AttributeError, KeyError, TypeError) as error:
        # the YAML library raises these for some malformed directives, tags and escapes
        raise ValidationError([f"{source}: not YAML: {error}"]) from None


def read_json(text: str, source: str) -> list[Text]:
    """The one document of a JSON text. Raises ValidationError with `source` and line."""
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise ValidationError([f"{source}:{error.lineno}: not JSON: {error.msg}"]) from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ValidationError([f"{source}: not JSON: {reason}"]) from None
    if problem := _json_problem(value):
        raise ValidationError([f"{source}: {problem}"])
    return [] if value is None else [Text(value, 1)]


def _json_problem(root: object) -> str:
    """ "" for a tree of no more than _DEPTH_MAX levels whose texts are Unicode."""
    level = [root]
    for _ in range(_DEPTH_MAX + 1):
        if any(isinstance(value, str) and not _encodes(value) for value in level):
            return "not valid Unicode"
        lists = [value for value in level if isinstance(value, list)]
        dicts = [value for value in level if isinstance(value, dict)]
        level = [member for value in lists for member in value]
        level += [part for value in dicts for pair in value.items() for part in pair]
        if not level:
            return ""
    return "nested too deeply"


def _encodes(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def line_of(node: Node) -> int:
    return int(node.start_mark.line) + 1


def _reader() -> YAML:
    reader = YAML(typ="safe", pure=True)
    reader.version = (1, 1)
    return reader


class _Values:
    """Builds the values of one document from its nodes."""

    def __init__(self, source: str, line: int) -> None:
        self._source = source
        self._line = line
        self._lines: dict[str, int] = {}
        self._left = _VALUES_MAX

    def text(self, root: Node) -> Text:
        value = self._value(root, "", 0)
        return Text(value, self._line, self._lines)

    def _value(self, node: Node, path: str, depth: int) -> object:
        self._left -= 1
        if depth > _DEPTH_MAX or self._left < 0:
            self._fail(node, "nested too deeply, or aliases that grow without bound")
        self._lines.setdefault(path, line_of(node))
        if isinstance(node, MappingNode):
            return self._mapping(node, path, depth)
        if isinstance(node, SequenceNode):
            return [self._value(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(node.value)]
        return self._scalar(node)

    def _mapping(self, node: MappingNode, path: str, depth: int) -> dict[str, object]:
        values: dict[str, object] = {}
        merged: dict[str, object] = {}
        for key_node, value_node in node.value:
            if _tag(key_node) == "merge":
                merged = {**self._merged(value_node, path, depth), **merged}
                continue
            key = self._key(key_node)
            if key in values:
                self._fail(key_node, f'key "{key}" already set in map')
            here = f"{path}.{key}" if path else key
            self._lines[here] = line_of(key_node)
            values[key] = self._value(value_node, here, depth + 1)
        return {**merged, **values}

    def _merged(self, node: Node, path: str, depth: int) -> dict[str, object]:
        """What `<<: *anchor` brings in; of several the first wins."""
        sources = node.value if isinstance(node, SequenceNode) else [node]
        merged: dict[str, object] = {}
        for source in sources:
            value = self._value(source, path, depth + 1)
            if not isinstance(value, dict):
                self._fail(source, "`<<` merges mappings only")
            merged = {**value, **merged}
        return merged

    def _key(self, node: Node) -> str:
        if not isinstance(node, ScalarNode):
            self._fail(node, "a key must be text")
        value = self._scalar(node)
        return value if isinstance(value, str) else str(node.value)

    def _scalar(self, node: Node) -> object:
        tag, text = _tag(node), str(node.value)
        try:
            if tag == "int":
                return _whole(text)
            if tag == "float":
                return _fraction(text)
        except ValueError:
            self._fail(node, f"not a number: {text[:50]}")
        if tag == "null":
            return None
        if tag == "bool":
            return text.lower() in ("true", "yes", "on", "y")
        if tag not in ("str", "timestamp", "value"):
            self._fail(node, f"the tag {node.tag} has no meaning in a manifest")
        if not _encodes(text):
            self._fail(node, "not valid Unicode")
        return text

    def _fail(self, node: Node, message: str) -> NoReturn:
        raise ValidationError([f"{self._source}:{line_of(node)}: {message}"])


def _tag(node: Node) -> str:
    tag = str(node.tag)
    return tag.removeprefix(_TAG) if tag.startswith(_TAG) else tag


def _whole(text: str) -> object:
    if ":" in text:  # base 60, which go-yaml reads as text
        return text
    digits = text.replace("_", "")
    sign, digits = (-1, digits[1:]) if digits.startswith("-") else (1, digits.removeprefix("+"))
    if len(digits) > 1 and digits[0] == "0" and digits[1].isdigit():
        return sign * int(digits, 8)
    return sign * int(digits, 0)


def _fraction(text: str) -> object:
    if ":" in text:
        return text
    value = float(text.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan"))
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values: dict[str, object] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f'key "{key}" already set in map')
        values[key] = value
    return values


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def lines_below(lines: Mapping[str, int], prefix: str) -> Iterator[tuple[str, int]]:
    """The entries of `lines` under `prefix`, with paths from there."""
    for path, line in lines.items():
        if path == prefix:
            yield "", line
        elif path.startswith(prefix) and path[len(prefix)] in ".[":
            yield path[len(prefix) :].removeprefix("."), line
