"""ASGI middleware around every request: a limit on its body, and the time to its answer."""

import time

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from smes_scorer.telemetry import Telemetry


class BodyLimit:
    """Answers 413 to a body over a limit without keeping it, with or without a ``Content-Length``.

    Args:
        app: The application behind it; it gets the body in one piece.
        max_body_bytes: Largest body that is let through.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        too_large = announced.isdigit() and int(announced) > self._max_body_bytes
        body = None if too_large else await self._read(receive)
        if body is None:
            detail = f"request body over {self._max_body_bytes} bytes (max_body_bytes)"
            # The rest of the body is not read, so the connection cannot be used again.
            refusal = JSONResponse({"detail": detail}, status_code=413, headers={"connection": "close"})
            await refusal(scope, receive, send)
            return
        if body["type"] == "http.disconnect":
            return
        pending: list[Message] = [body]

        async def replay() -> Message:
            return pending.pop() if pending else await receive()

        await self._app(scope, replay, send)

    async def _read(self, receive: Receive) -> Message | None:
        """The whole body as one message; None when it is too large; ``http.disconnect`` when the client left."""
        pieces: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return message
            pieces.append(message.get("body", b""))
            size += len(pieces[-1])
            if size > self._max_body_bytes:
                return None
            if not message.get("more_body", False):
                return {"type": "http.request", "body": b"".join(pieces), "more_body": False}


class RequestMeter:
    """Counts and times the answers to POST requests to one path.

    Args:
        app: The application behind it.
        path: Requests to other paths are not metered.
        telemetry: Where answers are counted.
    """

    def __init__(self, app: ASGIApp, path: str, telemetry: Telemetry) -> None:
        self._app = app
        self._path = path
        self._telemetry = telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != self._path or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        started_s = time.perf_counter()
        status: int | None = None

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        except BaseException:
            status = status or 500  # what the server answers when the application fails
            raise
        finally:
            if status is not None:  # None: the client left before its request was complete
                self._telemetry.request(status, time.perf_counter() - started_s)
