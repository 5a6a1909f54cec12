"""HTTP/1.1 as raw bytes: requests that two parsers may read in two ways, and replies read strictly. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from random import Random

from tools.fuzzing.door import Violation
from tools.fuzzing.mutations import NUMBERS, mutated

HOSTS = (b"one.default", b"two.default.localhost")
OUTSIDE = "outside.example"  # a server that is no service
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: one.default\r\n\r\n"

_METHODS = (b"GET", b"POST", b"HEAD", b"PUT", b"DELETE", b"OPTIONS", b"TRACE", b"CONNECT", b"PATCH", b"PRI", b"get",
            b"QUERY", b"M-SEARCH", b"G\x00T", b"", b" GET", b"A" * 300, b"GET\t", b"\xc3\xa9")  # fmt: skip
_TARGETS = (
    b"/", b"*", b"", b"//", b"//two.default/x", b"/default/two/x?y=1", b"/default/two", b"/default//x", b"/x y",
    b"/\xff", b"/\xc3\xa9", b"/\x00", b"/\x7f", b"/%zz%00%0d%0aX:%201", b"/a#b", b"/a?b#c", b"/?", b"/a\\b", b"/a\tb",
    b"/" + b"a" * 70_000, b"http://two.default.svc.cluster.local/x", b"http://two.default.svc", b"http://one.default?a",
    b"http://", b"http:///x", b"http://[::1/x", b"http://[::1]:x/", b"http://a:99999/", b"http://a:b@one.default/x",
    b"http://outside.example/x", b"http://outside.example:0/x", b"HTTP://outside.example/\xff", b"http://a b/",
    b"http://outside.example\\@x/", b"http://\xff/", b"http://%zz/", b"http://x..y/", b"http://.../", b"http://-/x",
    b"http://192.0.2.1/", b"https://one.default/x", b"ftp://one.default/", b"one.default:80", b"x", b"?", b"#", b":",
    b"http://" + b"a" * 300 + b".localhost/", b"http://outside.example:80:80/", b"http://xn--a/", b"http://a%2fb/",
    b"http://\xc3\xa9.example/", b"http://outside.example#/x", b"http://@/", b"http://outside.example/a?b c",
)  # fmt: skip
_VERSIONS = (b"HTTP/1.1", b"HTTP/1.0", b"HTTP/0.9", b"HTTP/1.2", b"HTTP/2.0", b"HTTP/1.10", b"HTTP/ 1.1", b"http/1.1",
             b"HTTP/1.1 ", b"", b"RTSP/1.0", b"HTTP/1.1\x00", b"HTTP/11", b"ICY/1.0")  # fmt: skip
_LINES = (
    b"Content-Length: 0", b"Content-Length: 4", b"Content-Length: +4", b"Content-Length: -1", b"Content-Length: 4, 4",
    b"Content-Length: 4,5", b"Content-Length: 0x4", b"Content-Length: 04", b"Content-Length: 4 4", b"Content-Length:",
    b"Content-Length: 99999999999999999999", b"Content-Length: 18446744073709551616", b"Content-Length: 4.0",
    b"Content-Length: \xd9\xa4", b"Content-Length: 1000000", b"Content_Length: 4", b"Content-Length\x00: 4",
    b"Content-Length : 4", b"Content-Length\t: 4", b" Content-Length: 4", b"Content-Length:\x0b4",
    b"Content-Length: 4;",
    b"Transfer-Encoding: chunked", b"Transfer-Encoding: Chunked", b"Transfer-Encoding: chunked, chunked",
    b"Transfer-Encoding: gzip, chunked", b"Transfer-Encoding: chunked, gzip", b"Transfer-Encoding: identity",
    b"Transfer-Encoding: xchunked", b"Transfer-Encoding: chunked;q=1", b"Transfer-Encoding:\tchunked",
    b"Transfer-Encoding: \x0bchunked", b"Transfer-Encoding : chunked", b"Transfer-Encoding: \"chunked\"",
    b"Transfer-Encoding:", b"Transfer-Encoding: ,chunked", b"Transfer-Encoding: chunked,", b"Transfer-Encoding: gzip",
    b"Transfer_Encoding: chunked", b"X: 1\nTransfer-Encoding: chunked", b"X: 1\rTransfer-Encoding: chunked",
    b"Transfer-Encoding:\r\n chunked", b"TE: trailers", b"Trailer: Content-Length", b"Trailer: X-After",
    b"Connection: close", b"Connection: keep-alive", b"Connection: content-length", b"Connection: host",
    b"Connection: transfer-encoding", b"Connection: close, x-forwarded-for", b"Connection: k-original-host, expect",
    b"Connection: \xff", b"Connection: upgrade", b"Connection: Upgrade, HTTP2-Settings", b"Connection: ,,;,",
    b"Connection: x-forwarded-for, k-proxy-request", b"Proxy-Connection: keep-alive", b"Keep-Alive: timeout=0",
    b"Upgrade: h2c", b"Upgrade: websocket", b"Upgrade: websocket\r\nConnection: upgrade", b"Upgrade: \xff",
    b"Upgrade: h2c\r\nConnection: upgrade, http2-settings\r\nHTTP2-Settings: AAMAAABkAAQAAP__", b"Upgrade: tcp",
    b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
    b"Host: two.default", b"Host:", b"Host: a b", b"Host: \xff", b"Host: nobody.default.localhost", b"Host: [::1",
    b"Host: one.default:99999", b"Host: one.default.", b"Host: ..", b"Host: one.default\x01", b"Host: \xc3\xa9",
    b"Host: one.default, two.default", b"Host: http://two.default/", b"Host: @two.default", b"Host: %00",
    b"Expect: 100-continue", b"Expect: 100-Continue", b"Expect: x", b"Expect:", b"Expect: \xff",
    b"Expect: 100-continue, x", b"Expect: 200-ok\r\nExpect: 100-continue",
    b"K-Network-Probe: probe", b"K-Network-Probe: probe\r\nK-Network-Hash: \xff", b"K-Network-Probe: activator",
    b"K-Network-Probe: probe\r\nK-Network-Hash: a", b"K-Network-Probe: queue", b"K-Network-Probe: \xff",
    b"User-Agent: kube-probe/1\r\nK-Network-Probe: queue", b"User-Agent: kube-probe/1\r\nK-Network-Probe: \xff",
    b"K-Kubelet-Probe: 1", b"K-Original-Host: two.default", b"K-Original-Host: \xff", b"K-Original-Host:",
    b"K-Proxy-Request: activator", b"Knative-Serving-Revision: other", b"Knative-Serving-Tag: \xff",
    b"Knative-Serving-Namespace: other\r\nKnative-Serving-Revision: x", b"Knative-Serving-Tag: new",
    b"X-Forwarded-For: \xff", b"X-Forwarded-For: 1\r\nX-Forwarded-For: 2", b"Forwarded: for=x", b"X-Forwarded-Host: x",
    b"X: \xff\xfe", b"X: \x00", b"X: \x01", b"X: \x7f", b"X: \x80", b"X:\t\t", b"X: a\tb", b"X: \xc3\xa9",
    b"X: \xed\xa0\x80", b"\xff: 1", b"X Y: 1", b": 1", b"X", b"X\x01: 1", b"(: 1", b" X: folded", b"\tX", b"\x00: \x00",
    b"X:" + b" " * 9000,
    b"X: " + b"y" * 66_000, b"X" * 66_000 + b": 1", b"X: " + b"y" * 8200, b"Cookie: " + b"a=b; " * 500,
    b"Content-Encoding: gzip", b"Accept-Encoding: br", b"Range: bytes=0-0", b"If-None-Match: *", b"Max-Forwards: 0",
    b"Authorization: Basic \xff", b"Content-Type: \xff", b"Sec-WebSocket-Key: x", b"HTTP2-Settings: x",
)  # fmt: skip
_SIZES = (b"0", b"4", b"04", b"+4", b"-4", b"0x4", b"4 ", b" 4", b"4\t", b"4;", b"4;a=b", b'4;a="\r\n"', b"4;\n", b"g",
          b"", b"5", b"3", b"ffffffffffffffff", b"10000000000000000", b"fffffffffffffffff", b"7fffffffffffffff",
          b"80000000", b"4;" + b"x" * 20_000, b"0" * 20_000 + b"4", b"4\r", b"4\x00", b"\xd9\xa4", b"4_0", b"4.0",
          b"100000")  # fmt: skip
_TRAILERS = (b"", b"", b"X-After: 1\r\n", b"Content-Length: 9\r\n", b"Host: two.default\r\n", b"X\r\n", b" x\r\n",
             b"Transfer-Encoding: chunked\r\n", b"X: " + b"y" * 70_000 + b"\r\n", b"X: \xff\x00\r\n",
             b"X: 1\r\n" * 1100)  # fmt: skip
_ENDS = (b"\n", b"\r", b"\r\r\n", b"\n\r\n", b"\r\n\r\n", b"\x00\r\n", b" \r\n", b"", b"\x0b\r\n", b"\r\n ", b"\r\n\t")
_FIRSTS = (
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00",
    b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03" + b"\x00" * 64, b"\r\n", b"\r\n\r\n\r\n", b"\n", b"\x00", b" ",
    b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b"PROXY TCP4 127.0.0.1 127.0.0.1 1 2\r\n", b"0\r\n\r\n",
    b"\xef\xbb\xbf",
    b"\x04\x01\x00\x50\x7f\x00\x00\x01\x00", b"\x05\x01\x00", b"GET /\r\n", b"HELO x\r\n",
)  # fmt: skip
_WORDS = (b"\r\n", b"\r\n\r\n", b"\n", b"\r", b":", b" ", b"0\r\n\r\n", b"HTTP/1.0", SMUGGLED, *_LINES[:30])
_DIGITS = re.compile(rb"\d+")


@dataclass(frozen=True, slots=True)
class Raw:
    """A request as its lines, without their ends, and what comes after the empty one."""

    lines: tuple[bytes, ...]
    body: bytes = b""

    def to_bytes(self, end: bytes = b"\r\n") -> bytes:
        return b"".join(line + end for line in self.lines) + end + self.body


def good_requests() -> list[Raw]:
    """Of every kind that is relayed."""
    chunks = b"4\r\nabcd\r\n10;x=y\r\n0123456789abcdef\r\n0\r\n"
    one, two = (b"Host: " + host for host in HOSTS)
    return [
        Raw((b"GET /a?b=c HTTP/1.1", one, b"Accept: */*", b"X-Twice: 1", b"X-Twice: 2")),
        Raw((b"GET /default/two/a%2Fb HTTP/1.1", b"Host: 127.0.0.1:8080", b"Connection: close")),
        Raw((b"POST /a HTTP/1.1", one, b"Content-Type: text/plain", b"Content-Length: 4"), b"abcd"),
        Raw((b"POST /a HTTP/1.1", two, b"Content-Length: %d" % len(SMUGGLED)), SMUGGLED),
        Raw((b"POST /a HTTP/1.1", two, b"Transfer-Encoding: chunked"), chunks + b"\r\n"),
        Raw((b"PUT /a HTTP/1.1", one, b"Transfer-Encoding: chunked", b"Trailer: X"), chunks + b"X: 1\r\n\r\n"),
        Raw((b"POST /a HTTP/1.1", one, b"Expect: 100-continue", b"Content-Length: 4"), b"abcd"),
        Raw((b"POST /a HTTP/1.1", one, b"Content-Length: 300000"), b"a" * 300_000),  # more than is read at once
        Raw((b"HEAD /a HTTP/1.1", two)),
        Raw((b"OPTIONS * HTTP/1.1", one)),
        Raw((b"DELETE http://two.default.svc.cluster.local/x HTTP/1.1", b"Host: two.default.svc.cluster.local")),
        Raw((b"GET http://outside.example/x HTTP/1.1", b"Host: outside.example")),
        Raw((b"GET / HTTP/1.0", one)),
        Raw((b"POST / HTTP/1.0", two, b"Connection: keep-alive", b"Content-Length: 4"), b"abcd"),
        Raw((b"GET / HTTP/1.1", one, b"Upgrade: websocket", b"Connection: Upgrade")),
        Raw((b"GET / HTTP/1.1", one, b"K-Network-Probe: probe", b"K-Network-Hash: 1")),
    ]  # fmt: skip


def hostile_bytes(random: Random, good: list[Raw]) -> bytes:
    """One to four requests on one connection, at least one of them odd; or no HTTP at all."""
    kind = random.randrange(24)
    if kind == 0:
        return mutated(random, random.choice(_FIRSTS), _WORDS)
    requests = [random.choice(good) for _ in range(random.choice((1, 1, 1, 2, 2, 4)))]
    odd = random.randrange(len(requests))
    parts = [_hostile(random, raw) if at == odd else raw.to_bytes() for at, raw in enumerate(requests)]
    if kind == 1:
        parts.insert(0, random.choice(_FIRSTS))
    data = b"".join(parts)
    if kind < 6:
        return mutated(random, data, _WORDS)
    return data[: random.randrange(len(data) + 1)] if kind == 6 else data


def _hostile(random: Random, raw: Raw) -> bytes:
    kind = random.randrange(13)
    if kind < 4:
        return _with_line(random, raw).to_bytes()
    if kind == 4:
        return _with_line(random, _with_line(random, raw)).to_bytes()
    if kind == 5:
        return _with_other_start(random, raw).to_bytes()
    if kind == 6:
        return _with_odd_end(random, raw)
    if kind == 7:
        return replace(raw, lines=_one_changed(random, raw.lines)).to_bytes()
    if kind == 8:
        at = random.randrange(len(raw.lines))
        lines = raw.lines[:at] + raw.lines[at:][1:] if random.random() < 0.5 else (*raw.lines, raw.lines[at])
        return replace(raw, lines=lines).to_bytes()
    if kind == 9:
        return _with_many_lines(random, raw).to_bytes()
    return _two_ways(random, raw) if kind == 10 else _odd_chunks(random, raw)


def _with_line(random: Random, raw: Raw) -> Raw:
    at = random.randint(1, len(raw.lines)) if len(raw.lines) > 1 else len(raw.lines)
    line = random.choice(_LINES)
    if random.random() < 0.2:
        line = _DIGITS.sub(lambda _: b"%d" % random.choice(NUMBERS), line)
    if random.random() < 0.1:
        line = mutated(random, line, _WORDS)
    return replace(raw, lines=(*raw.lines[:at], line, *raw.lines[at:]))


def _with_other_start(random: Random, raw: Raw) -> Raw:
    method, target, version = raw.lines[0].split(b" ")
    kind = random.randrange(8)
    method = random.choice(_METHODS) if kind in (0, 7) else method
    target = random.choice(_TARGETS) if kind in (1, 2, 3, 4, 7) else target
    version = random.choice(_VERSIONS) if kind in (5, 7) else version
    space = random.choice((b"  ", b"\t", b"\x0b", b"\r ", b"")) if kind == 6 else b" "
    return replace(raw, lines=(space.join((method, target, version)), *raw.lines[1:]))


def _with_odd_end(random: Random, raw: Raw) -> bytes:
    """Lines that do not all end by CR LF."""
    end = random.choice(_ENDS)
    if random.random() < 0.3:
        return raw.to_bytes(end)
    at = random.randrange(len(raw.lines) + 1)
    lines = (*raw.lines, b"")
    return b"".join(line + (end if number == at else b"\r\n") for number, line in enumerate(lines)) + raw.body


def _one_changed(random: Random, lines: tuple[bytes, ...]) -> tuple[bytes, ...]:
    at = random.randrange(len(lines))
    line = lines[at]
    name, colon, value = line.partition(b":")
    changes = (
        name + b" :" + value, name + b"\t:" + value, name + b"::" + value, name + b"\x00" + colon + value,
        name + colon + b"\r\n " + value, name + colon + b"\n" + value, name + colon + value + b" ", name + colon,
        b" " + line, name.upper() + colon + value, name.replace(b"-", b"_") + colon + value, line + b"\x00",
        line[: len(line) // 2] + random.choice((b"\xff", b"\x00", b"\r", b"\n", b"\x7f")) + line[len(line) // 2 :],
        mutated(random, line, _WORDS),
    )  # fmt: skip
    return (*lines[:at], random.choice(changes), *lines[at + 1 :])


def _with_many_lines(random: Random, raw: Raw) -> Raw:
    count = random.choice((20, 97, 127, 128, 129, 900, 997, 998, 999, 1000, 1001))
    value = b"v" * random.choice((0, 1, 60, 500)) if count < 900 else b"v"
    return replace(raw, lines=raw.lines + tuple(b"X-%d: %b" % (number, value) for number in range(count)))


def _two_ways(random: Random, raw: Raw) -> bytes:
    """A request whose body ends in one of two places, with another request behind the first of them."""
    lengths = tuple(line for line in _LINES if line[:14].lower() in (b"content-length", b"content_length"))
    codings = tuple(line for line in _LINES if b"ransfer" in line)
    lines = [line for line in raw.lines if line[:8].lower() not in (b"content-", b"transfer")]
    lines += random.sample(
        (random.choice(lengths), random.choice(codings), b"Content-Length: %d" % (5 + len(SMUGGLED))), 2
    )
    return Raw(tuple(lines), b"0\r\n\r\n" + SMUGGLED).to_bytes()


def _odd_chunks(random: Random, raw: Raw) -> bytes:
    lines = [line for line in raw.lines if line[:8].lower() not in (b"content-", b"transfer")]
    chunks = [b"4\r\nabcd\r\n", random.choice(_SIZES) + random.choice((b"\r\n", b"\r\n", b"\r\n", b"\n", b"\r"))]
    chunks += [b"abcd" + random.choice((b"\r\n", b"\r\n", b"\n", b"", b"xx", b"\r")), b"0\r\n"]
    chunks += [random.choice(_TRAILERS), b"\r\n", random.choice((b"", SMUGGLED))]
    return Raw((*lines, b"Transfer-Encoding: chunked"), b"".join(chunks)).to_bytes()


# -- replies


@dataclass(frozen=True, slots=True)
class RawReply:
    """Header names are in lower case; of repeated ones the last."""

    status: int
    headers: Mapping[str, str]
    body: bytes


_STATUS_LINE = re.compile(rb"HTTP/(?:1\.[01]|[0-9]\.[0-9](?= 505)) ([1-5][0-9][0-9]) [\t -~]*")
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\t -~\x80-\xff]*)")
_CHUNK_HEAD = re.compile(rb"([0-9a-f]+)\r\n")


def read_replies(data: bytes, *, ended: bool, heads: bool) -> tuple[list[RawReply], bytes]:
    """The final replies of a connection, and what is there of one that is not whole. `ended`: the server has closed,
    which ends a body without length; `heads`: some may answer HEAD. Raises Violation if anything else is no HTTP."""
    found: list[RawReply] = []
    while data:
        head, end, rest = data.partition(b"\r\n\r\n")
        if not end:
            break
        first, *lines = head.split(b"\r\n")
        status = _STATUS_LINE.fullmatch(first)
        fields = [_FIELD.fullmatch(line) for line in lines]
        if status is None or not all(fields):
            raise Violation("crash", f"no reply of HTTP/1.1: {head[:300]!r}")
        pairs = [(field[1].decode().lower(), field[2].decode("latin-1")) for field in fields if field]
        framing = [value for name, value in pairs if name in ("content-length", "transfer-encoding")]
        if len(framing) > 1:
            raise Violation("crash", f"a reply whose body has two lengths: {head[:300]!r}")
        code, headers = int(status[1]), dict(pairs)
        if code < 200:
            data = rest
            continue
        bodiless = code in (204, 304) or (heads and (not rest or _STATUS_LINE.match(rest) is not None))
        body = (b"", rest) if bodiless else _body(headers, rest, ended)
        if body is None:
            break
        found.append(RawReply(code, headers, body[0]))
        data = body[1]
    return found, data


def _body(headers: Mapping[str, str], data: bytes, ended: bool) -> tuple[bytes, bytes] | None:
    """The body and what is behind it; None if it is not whole."""
    if headers.get("transfer-encoding") == "chunked":
        return _chunks(data)
    if "transfer-encoding" in headers:
        raise Violation("crash", f"a reply with the transfer coding {headers['transfer-encoding']!r}")
    if "content-length" not in headers:
        return (data, b"") if ended else None
    size = int(headers["content-length"])
    return (data[:size], data[size:]) if len(data) >= size else None


def _chunks(data: bytes) -> tuple[bytes, bytes] | None:
    body, at = bytearray(), 0
    while head := _CHUNK_HEAD.match(data, at):
        size = int(head[1], 16)
        piece = data[head.end() : head.end() + size + 2]
        if len(piece) < size + 2:
            return None
        if not piece.endswith(b"\r\n"):
            raise Violation("crash", f"a chunk of {size} bytes does not end where it says")
        body += piece[:-2]
        at = head.end() + size + 2
        if not size:
            return bytes(body), data[at:]
    return None
