"""Text to token ids and back, from a checkpoint's tokenizer.json, without Transformers (which would bring torch).

What the special tokens are is spread over five files; `load_tokenizer` reads them all once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import tokenizers

from functions.contract.checkpoint import exists, open_file

T = TypeVar("T")

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


class TokenizerError(Exception):
    """Text cannot be handled; the message says which file is missing or broken and what still works."""


@dataclass(frozen=True)
class Tokenizer:
    """`backend` is None where the checkpoint has no tokenizer.json: token ids still work, text raises TokenizerError.

    `eos_ids` end an answer; `special` are the texts by name (bos_token, eos_token, ...) that chat templates use."""

    location: str
    backend: tokenizers.Tokenizer | None
    special: Mapping[str, str]
    eos_ids: frozenset[int]
    chat_template: str | None
    byte_level: bool = False  # pieces spell bytes in GPT-2's alphabet
    # texts of tokens by themselves, as they are asked for
    _alone: dict[int, str] = field(default_factory=dict, init=False, repr=False, compare=False)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Raises TokenizerError for text that is not Unicode (half a surrogate pair) and without tokenizer.json."""
        backend = self._need()
        if (at := half_character(text)) is not None:
            raise TokenizerError(f"the text is not valid Unicode at character {at}")
        return list(self._asked(backend.encode, text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` without special tokens; "" without tokenizer.json, so that ids can be served alone."""
        if self.backend is None:
            return ""
        if len(ids) != 1:
            return str(self._asked(self.backend.decode, list(ids), skip_special_tokens=True))
        # detokenizing asks for them again and again
        text = self._alone.get(ids[0])
        if text is None:
            text = self._alone[ids[0]] = self._asked(self.backend.decode, [ids[0]], skip_special_tokens=True)
        return text

    def token_bytes(self, token: int) -> bytes | None:
        """The bytes that a token stands for, also where they are only a part of a character; None if unknown."""
        piece = self.backend.id_to_token(token) if self.backend is not None else None
        if piece is None:
            return None
        if self.byte_level and all(char in _BYTE_OF for char in piece):
            return bytes(_BYTE_OF[char] for char in piece)
        if match := _BYTE_PIECE.fullmatch(piece):
            return bytes([int(match[1], 16)])
        return piece.replace("\u2581", " ").encode()

    def token_text(self, token: int) -> str:
        """A token by itself, as OpenAI writes it: text, or `bytes:\\xe2\\x9c` where it is a part of a character."""
        spelled = self.token_bytes(token)
        if spelled is None:
            return f"token_id:{token}"
        try:
            return spelled.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)

    def is_special(self, token: int) -> bool:
        return self.backend is not None and self.decode([token]) == ""

    def _asked(self, function: Callable[..., T], *args: object, **options: object) -> T:
        """What a function of the library returns. It reads files whose parts do not fit together (a template with a
        sequence that is never given), and then panics, by an exception that is none of Python's ordinary ones."""
        try:
            return function(*args, **options)
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            raise TokenizerError(
                f"{self.location}/tokenizer.json is not in order: tokenizers cannot use it ({error}); save it "
                "anew with save_pretrained"
            ) from None

    def _need(self) -> tokenizers.Tokenizer:
        if self.backend is None:
            raise TokenizerError(
                f"{self.location} holds no tokenizer.json, so text cannot be tokenized; send token ids as the prompt, "
                "or add the file (save_pretrained of a fast tokenizer of Transformers writes it)"
            )
        return self.backend


def load_tokenizer(location: str) -> Tokenizer:
    """Reads tokenizer.json and what surrounds it. Raises TokenizerError when a file that is there is broken."""
    options = _read_json(location, "tokenizer_config.json")
    text = _read_text(location, "tokenizer.json")
    backend = _backend(location, text) if text is not None else None
    special = _special_tokens(_read_json(location, "special_tokens_map.json"), options)
    return Tokenizer(
        location=location,
        backend=backend,
        special=special,
        eos_ids=_eos_ids(location, backend, special),
        chat_template=_chat_template(location, options),
        byte_level=text is not None and _is_byte_level(json.loads(text)),
    )


def _backend(location: str, text: str) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the package raises bare Exception
        raise TokenizerError(f"{location}/tokenizer.json cannot be read: {error}") from None
    # files written after training often cut or pad texts; a server must do neither
    backend.no_truncation()
    backend.no_padding()
    return backend


def _special_tokens(*sources: Mapping[str, Any]) -> dict[str, str]:
    """Names to texts, later sources first in rank; an entry is a text or an object with `content`."""
    found: dict[str, str] = {}
    for source in sources:
        for name, value in source.items():
            content = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(content, str) and half_character(content) is None:
                found[name] = content
    return found


def half_character(text: str) -> int | None:
    """Where half a surrogate pair stands, which is no character, and which JSON may spell; None if nowhere."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def _eos_ids(location: str, backend: tokenizers.Tokenizer | None, special: Mapping[str, str]) -> frozenset[int]:
    """What generation_config.json says (config.json where it says nothing) and the tokenizer's own eos token."""
    ids = set(_id_list(_read_json(location, "generation_config.json")))
    if not ids:
        config = _read_json(location, "config.json")
        nested = config.get("text_config")
        ids = set(_id_list(config)) or set(_id_list(nested if isinstance(nested, dict) else {}))
    eos = special.get("eos_token")
    if backend is not None and eos is not None and (token := backend.token_to_id(eos)) is not None:
        ids.add(token)
    return frozenset(ids)


def _id_list(config: Mapping[str, Any]) -> Iterable[int]:
    value = config.get("eos_token_id")
    values = value if isinstance(value, list) else [value]
    return [item for item in values if type(item) is int and item >= 0]


def _chat_template(location: str, options: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, or the one in tokenizer_config.json: a text, or a list of {name, template}."""
    text = _read_text(location, "chat_template.jinja")
    if text is not None:
        return text
    value = options.get("chat_template")
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None


def _read_text(location: str, file: str) -> str | None:
    if not exists(location, file):
        return None
    with open_file(location, file) as stream:
        try:
            return stream.read().decode()
        except UnicodeDecodeError:
            raise TokenizerError(f"{location}/{file} is not UTF-8 text") from None


def _read_json(location: str, file: str) -> dict[str, Any]:
    text = _read_text(location, file)
    if text is None:
        return {}
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{location}/{file} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise TokenizerError(f"{location}/{file} must hold a JSON object")
    return data


def _is_byte_level(data: Mapping[str, Any]) -> bool:
    decoder = data.get("decoder") or {}
    return any(part.get("type") == "ByteLevel" for part in [decoder, *decoder.get("decoders", [])])


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 stands for itself, the others follow from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + i): byte for i, byte in enumerate(shifted)}


_BYTE_OF = _byte_alphabet()
