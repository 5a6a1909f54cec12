"""Who may use the public endpoints: whoever sends one of the keys in a file, as `Authorization: Bearer KEY`.

The file has a key a line, with a name before it if it should have one (`team-a: KEY`), and comments (#). Only hashes of
the keys are kept. Health, readiness and metrics need no key, for those who ask have none.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from functions.contract.watched_file import WatchedFile, key_lines
from orchestrator.generation import GenerationError
from orchestrator.http_guard import App, ErrorBody, Receive, Scope, Send, refuse

KEY_CHARACTERS_MIN = 16
_LINE = re.compile(r"(?:(?P<name>[A-Za-z0-9._-]{1,64}):[ \t]*)?(?P<key>[\x21-\x39\x3b-\x7e]+)")
_OPEN = re.compile(r"/?|/metrics|/v2/health/(live|ready)|/v2/models/[^/]+(/versions/[^/]+)?/ready")
_OPEN_CALLS = ("ServerLive", "ServerReady", "ModelReady")
_CHALLENGE = b'Bearer realm="stagecraft"'


@dataclass(frozen=True, slots=True)
class ApiKeys:
    """SHA-256 of each key: of the same length whatever the keys' are, and nothing to leak."""

    hashes: tuple[bytes, ...]

    def accept(self, token: str) -> bool:
        """In the same time for each token of a length: all keys are compared, none before the other ends."""
        given = hashlib.sha256(token.encode(errors="surrogatepass")).digest()
        found = [hmac.compare_digest(given, one) for one in self.hashes]
        return any(found)


def parse_api_keys(content: bytes) -> ApiKeys:
    """Raises ValueError, which quotes no key."""
    return ApiKeys(tuple(hashlib.sha256(key.encode()).digest() for key in _keys(content)))


def first_api_key(content: bytes) -> str:
    """What a client sends that has such a file. Raises ValueError, which quotes no key."""
    return _keys(content)[0]


def _keys(content: bytes) -> list[str]:
    keys = []
    for number, line in key_lines(content):
        found = _LINE.fullmatch(line)
        if found is None or len(found["key"]) < KEY_CHARACTERS_MIN:
            raise ValueError(
                f"line {number} must be a key of at least {KEY_CHARACTERS_MIN} visible ASCII characters without a "
                "colon, or NAME: KEY"
            )
        keys.append(found["key"])
    if not keys:
        raise ValueError("it holds no key; write one a line")
    return keys


class ApiKeyGuard:
    """ASGI middleware before everything else. `open_paths` need no key besides those that never do."""

    def __init__(
        self, app: App, *, keys: WatchedFile[ApiKeys], error_body: ErrorBody, open_paths: frozenset[str] = frozenset()
    ) -> None:
        self._app = app
        self._keys = keys
        self._error_body = error_body
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._is_open(scope["path"]):
            given = [value for name, value in scope["headers"] if name == b"authorization"]
            if (error := refusal(self._keys, [value.decode("latin-1") for value in given])) is not None:
                challenge = _CHALLENGE + (b', error="invalid_token"' if given else b"")
                body: Mapping[str, Any] = self._error_body(scope["path"], error)
                await refuse(send, error, body, [(b"www-authenticate", challenge)])
                return
        await self._app(scope, receive, send)

    def _is_open(self, path: str) -> bool:
        return path in self._open_paths or _OPEN.fullmatch(path) is not None


def refusal(keys: WatchedFile[ApiKeys], authorizations: list[str]) -> GenerationError | None:
    """Why a request with these values of the header `authorization` is not let in; None if it is."""
    if not authorizations:
        return _refused("an API key is needed: send the header 'Authorization: Bearer KEY'")
    scheme, _, token = authorizations[0].partition(" ")
    if len(authorizations) > 1 or scheme.lower() != "bearer" or not token.strip():
        return _refused("the header 'Authorization' must be there once, as 'Bearer KEY'")
    if not keys.value.accept(token.strip()):
        return _refused("the API key is not one of those that this server knows")
    return None


def is_open_call(method: str) -> bool:
    """Whether a gRPC method (/package.Service/Name) needs no key."""
    return method.rpartition("/")[2] in _OPEN_CALLS


def _refused(message: str) -> GenerationError:
    return GenerationError(message, status=401, code="invalid_api_key")
