"""What is refused before anything looks at it: strangers' pages, other formats, and too much."""

import json
import re

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from xgblora.serving.protocol import problem

MOST_BYTES = 1_000_000
"""Of a request."""
MOST_DRAINED = 64_000_000
"""Of a request that is too large, so that its sender hears of it."""
HOSTS = ("127.0.0.1", "localhost", "[::1]")
PORT = re.compile(r":\d+$")


class Guard:
    """Lets requests of this machine through, as JSON of a bounded size.

    Pages of strangers that are open in a browser here can send requests to a port of this machine, under its name or,
    by a name server of theirs, under their own (DNS rebinding): ``Origin`` and ``Host`` give them away.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request, or pass it on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        refused = _refusal(scope["method"], headers)
        body = b"" if refused else await _body(receive)
        if body is None:
            refused = 413, f"a request is at most {MOST_BYTES:,} bytes"
        elif not refused and scope["method"] == "POST":
            try:
                json.loads(body)
            except (ValueError, RecursionError):
                refused = 400, "the request is no JSON"
        if refused:
            await JSONResponse(problem(refused[1]), refused[0])(scope, receive, send)
            return
        await self.app(scope, _again(body or b"", receive), send)


def _refusal(method: str, headers: dict[str, str]) -> tuple[int, str] | None:
    if PORT.sub("", headers.get("host", "")).lower() not in HOSTS:
        return 403, f"this server answers as {HOSTS[0]} alone"
    origin = headers.get("origin")
    if origin is not None and origin.removeprefix("http://") != headers["host"]:
        return 403, "pages of other sites may not ask this server"
    if method not in ("GET", "HEAD", "POST"):
        return 405, f"{method} is not answered"
    if method == "POST" and headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        return 415, "send JSON (Content-Type: application/json)"
    if int(headers.get("content-length", "0") or 0) > MOST_DRAINED:
        return 413, f"a request is at most {MOST_BYTES:,} bytes"
    return None


async def _body(receive: Receive) -> bytes | None:
    """All of a request; None where it is too large."""
    parts, size = [], 0
    while True:
        message = await receive()
        size += len(message.get("body", b""))
        if size <= MOST_BYTES:
            parts.append(message.get("body", b""))
        if not message.get("more_body") or size > MOST_DRAINED:
            return b"".join(parts) if size <= MOST_BYTES else None


def _again(body: bytes, receive: Receive) -> Receive:
    """A request that was read already, to be read once more."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def read() -> Message:
        return waiting.pop() if waiting else await receive()

    return read
