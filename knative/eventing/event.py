"""A CloudEvent 1.0, checked when built, and its JSON form (CloudEvents spec 1.0.2; JSON event format 1.0.2).

Attributes are kept as text, the canonical string form of the CloudEvents type system. The JSON format also knows
numbers and booleans; `typed` names the extensions that came as such, so that they leave as such again.

Own code instead of the CloudEvents SDK (1.12), which reads JSON data and writes it anew (large numbers and member order
change), takes values of any type, name and spec version, and invents `time`.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Self

from knative.errors import KnativeError
from knative.eventing import attributes as rules
from knative.eventing.json_text import JsonError, JsonNumber, JsonValue, is_document, read_array, read_object

Value = str | int | bool  # an attribute in the type that a JSON event gives it

REQUIRED = ("id", "source", "specversion", "type")
CORE = frozenset((*REQUIRED, "datacontenttype", "dataschema", "subject", "time"))
JSON_CONTENT = "application/json"
_INTEGER = re.compile(r"-?(?:0|[1-9][0-9]{0,9})")
# what a string in a JSON event may be encoded to; anything else has to come as data_base64
_CHARSETS = {"utf-8": "utf-8", "utf8": "utf-8", "us-ascii": "ascii", "iso-8859-1": "latin-1", "utf-16": "utf-16"}


class InvalidEvent(KnativeError):
    """Not a CloudEvent 1.0; the text says what is wrong and what is allowed."""

    status = 400


@dataclass(frozen=True, slots=True)
class CloudEvent:
    """`attributes` by name, extensions included. `data` is the payload as its content type has it; None: no data.

    Empty data is no data, since HTTP cannot tell them apart. `typed`: extensions that are JSON numbers or booleans.
    Raises InvalidEvent when built from anything that the spec does not allow.
    """

    attributes: Mapping[str, str]
    data: bytes | None = None
    typed: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        object.__setattr__(self, "attributes", MappingProxyType(dict(self.attributes)))
        object.__setattr__(self, "data", self.data or None)
        problems = [f"{name} is missing" for name in REQUIRED if name not in self.attributes]
        problems += [
            problem for name, text in self.attributes.items() if (problem := rules.problem_of(name, text)) is not None
        ]
        problems += [f"{name} cannot have a JSON type" for name in self.typed if not self._may_be_typed(name)]
        if problems:
            raise InvalidEvent("not a CloudEvent 1.0: " + "; ".join(problems))

    def _may_be_typed(self, name: str) -> bool:
        text = self.attributes.get(name)
        return text is not None and name not in CORE and (text in ("true", "false") or _is_int32(text))

    @classmethod
    def build(cls, values: Mapping[str, Value], data: bytes | None = None) -> Self:
        """From attributes in their types. Raises InvalidEvent."""
        typed = frozenset(name for name, value in values.items() if not isinstance(value, str))
        return cls({name: _text(value) for name, value in values.items()}, data, typed)

    @property
    def id(self) -> str:
        return self.attributes["id"]

    @property
    def source(self) -> str:
        return self.attributes["source"]

    @property
    def type(self) -> str:
        return self.attributes["type"]

    def values(self) -> dict[str, Value]:
        """Attributes in the types of a JSON event."""
        return {name: self._value(name, text) for name, text in self.attributes.items()}

    def _value(self, name: str, text: str) -> Value:
        if name not in self.typed:
            return text
        return text == "true" if text in ("true", "false") else int(text)

    def changed(self, changes: Mapping[str, Value | None]) -> Self:
        """With some attributes set; None takes one away. Raises InvalidEvent."""
        values = {**self.values(), **changes}
        return type(self).build({name: value for name, value in values.items() if value is not None}, self.data)

    def to_json(self) -> bytes:
        """The JSON event. JSON data stands in it as it is (but for space around it), other text as a string, the rest,
        and all data without a datacontenttype, in base64."""
        attributes = json.dumps(self.values(), ensure_ascii=False, separators=(",", ":")).encode()
        return attributes[:-1] + self._data_member() + b"}"

    def _data_member(self) -> bytes:
        if self.data is None:
            return b""
        content_type = self.attributes.get("datacontenttype", "")
        if is_json(content_type) and is_document(self.data):
            return b',"data":' + self.data.strip(b" \t\r\n")
        if _is_text(content_type):
            try:
                return b',"data":' + json.dumps(self.data.decode(), ensure_ascii=False).encode()
            except UnicodeDecodeError:
                pass  # said to be text and is not: goes as bytes
        return b',"data_base64":"' + base64.b64encode(self.data) + b'"'

    @classmethod
    def from_json(cls, document: bytes) -> Self:
        """The event of a JSON object. Raises InvalidEvent."""
        try:
            members = read_object(document)
        except JsonError as error:
            raise InvalidEvent(f"not a JSON event: {error}") from None
        return cls._from_members(members)

    @classmethod
    def from_json_batch(cls, document: bytes, *, events_max: int | None = None) -> list[Self]:
        """The events of a JSON array; all or none. Raises InvalidEvent, saying which event is wrong."""
        try:
            items = read_array(document, items_max=events_max)
        except JsonError as error:
            raise InvalidEvent(f"not a JSON batch of events: {error}") from None
        events = []
        for index, members in enumerate(items):
            try:
                events.append(cls._from_members(members))
            except InvalidEvent as error:
                raise InvalidEvent(f"event {index} of the batch: {error}") from None
        return events

    @classmethod
    def _from_members(cls, members: Mapping[str, JsonValue]) -> Self:
        values = {
            name: _attribute(name, member.value)
            for name, member in members.items()
            if name not in ("data", "data_base64") and member.value is not None
        }
        data = _data(members, values)
        return cls.build(values, data)


def is_json(content_type: str) -> bool:
    """Whether data of this media type is JSON: */json or */*+json."""
    media_type = content_type.partition(";")[0].strip().lower()
    return media_type.endswith(("/json", "+json"))


def _is_text(content_type: str) -> bool:
    """Whether data of this type goes into JSON as a string: text or XML in UTF-8."""
    media_type = content_type.partition(";")[0].strip().lower()
    is_text = media_type.startswith("text/") or media_type.endswith(("/xml", "+xml"))
    return is_text and rules.charset(content_type) in ("", "utf-8", "utf8", "us-ascii")


def _is_int32(text: str) -> bool:
    return _INTEGER.fullmatch(text) is not None and -(2**31) <= int(text) < 2**31


def _text(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _attribute(name: str, value: object) -> Value:
    if isinstance(value, JsonNumber):
        if name in CORE or not _is_int32(value):
            wanted = "a string" if name in CORE else "a whole number from -2147483648 to 2147483647, or a string"
            raise InvalidEvent(f"not a CloudEvent 1.0: {name} is the number {value[:40]}, must be {wanted}")
        return int(value)
    if isinstance(value, str) or (isinstance(value, bool) and name not in CORE):
        return value
    kind = {bool: "a boolean", dict: "an object", list: "an array"}.get(type(value), "of another type")
    raise InvalidEvent(f"not a CloudEvent 1.0: {name} is {kind}, must be a string")


def _data(members: Mapping[str, JsonValue], values: dict[str, Value]) -> bytes | None:
    """The payload; says in `values` that it is JSON where the event leaves that to be understood."""
    plain, encoded = members.get("data"), members.get("data_base64")
    if encoded is not None and encoded.value is None:
        encoded = None
    if plain is not None and encoded is not None:
        raise InvalidEvent("not a JSON event: data and data_base64 are both there, only one of them is allowed")
    if encoded is not None:
        return _from_base64(encoded.value)
    if plain is None:
        return None
    content_type = values.setdefault("datacontenttype", JSON_CONTENT)
    if is_json(str(content_type)):
        return plain.source.encode()
    return _from_string(plain.value, str(content_type))


def _from_base64(value: object) -> bytes:
    if not isinstance(value, str) or isinstance(value, JsonNumber):
        raise InvalidEvent("not a JSON event: data_base64 must be a string")
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidEvent(f"not a JSON event: data_base64 is not base64 (RFC 4648): {error}") from None


def _from_string(value: object, content_type: str) -> bytes | None:
    if value is None:
        return None
    if not isinstance(value, str) or isinstance(value, JsonNumber):
        raise InvalidEvent(f"not a JSON event: data of datacontenttype {content_type} must be a string")
    charset = rules.charset(content_type) or "utf-8"
    try:
        return value.encode(_CHARSETS[charset])
    except (KeyError, UnicodeEncodeError):
        raise InvalidEvent(
            f"not a JSON event: data cannot be written in charset {charset}; send it encoded in data_base64"
        ) from None
