"""The platform's HTTP stack with nothing behind it: aiohttp's low-level server under uvloop reads what comes and
answers 202. Prints {"port": N}.

A GET is answered by how many POSTs there were since the last GET, and when by a clock that only goes forward:
{"count": N, "first_s": T, "last_s": T}.
"""

from __future__ import annotations

import asyncio
import json
import time

import uvloop
from aiohttp import web


class Accept:
    def __init__(self) -> None:
        self._stamps_s: list[float] = []

    async def serve(self, request: web.BaseRequest) -> web.Response:
        if request.method == "GET":
            stamps_s, self._stamps_s = self._stamps_s, []
            ends = {"first_s": stamps_s[0], "last_s": stamps_s[-1]} if stamps_s else {}
            return web.json_response({"count": len(stamps_s), **ends})
        await request.read()
        self._stamps_s.append(time.monotonic())
        return web.Response(status=202)


async def main() -> None:
    runner = web.ServerRunner(web.Server(Accept().serve, access_log=None, keepalive_timeout=3600))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(json.dumps({"port": runner.addresses[0][1]}), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
