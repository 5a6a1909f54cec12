"""The least that an HTTP service in Python can be: a raw ASGI app under uvicorn, with its own choice of event loop and
parser (uvloop and httptools where installed). Listens on PORT, or any free one, prints {"port": N}, and answers a
POST with its body.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from typing import Any

import uvicorn


async def echo(scope: dict[str, Any], receive: Any, send: Any) -> None:
    parts, more = [], True
    while more:
        message = await receive()
        parts.append(message["body"])
        more = message["more_body"]
    body = b"".join(parts)
    headers = [(b"content-type", b"application/octet-stream"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def main() -> None:
    config = uvicorn.Config(echo, lifespan="off", log_level="warning", access_log=False, timeout_keep_alive=3600)
    with socket.create_server(("127.0.0.1", int(os.environ.get("PORT", "0"))), backlog=1024) as sock:
        print(json.dumps({"port": sock.getsockname()[1]}), flush=True)
        loop = config.get_loop_factory()
        with asyncio.Runner(loop_factory=loop) as runner:
            runner.run(uvicorn.Server(config).serve([sock]))


if __name__ == "__main__":
    main()
