"""What stands around the application: the limits on a request's body and time, its meter, and the end of both."""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from smes_scorer.telemetry import Telemetry

_METERED = "smes.metered"  # key of the scope


class BodyLimit:
    """Answers 413 to a body over a limit without keeping it, and 408 to one that takes too long to arrive.

    Args:
        app: The application behind it; it gets the body in one piece.
        max_body_bytes: Largest body that is let through, with or without a ``Content-Length``.
        body_timeout_s: Longest time from a request's headers to the end of its body.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int, body_timeout_s: float) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._body_timeout_s = body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        too_large = announced.isdigit() and int(announced[:20]) > self._max_body_bytes
        try:
            async with asyncio.timeout(self._body_timeout_s):
                body = None if too_large else await self._read(receive)
        except TimeoutError:
            detail = f"request body not complete after {self._body_timeout_s:g} s (body_timeout_s)"
            await closing(408, detail)(scope, receive, send)
            return
        if body is None:
            await closing(413, f"request body over {self._max_body_bytes} bytes (max_body_bytes)")(scope, receive, send)
            return
        if body["type"] == "http.disconnect":
            return
        pending: list[Message] = [body]

        async def replay() -> Message:
            return pending.pop() if pending else await receive()

        await self._app(scope, replay, send)

    async def _read(self, receive: Receive) -> Message | None:
        """The whole body as one message; None when it is too large; ``http.disconnect`` when the client left."""
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return message
            body += message.get("body", b"")
            if len(body) > self._max_body_bytes:
                return None
            if not message.get("more_body", False):
                return {"type": "http.request", "body": bytes(body), "more_body": False}


class TimeLimit:
    """Answers 503 to a request whose answer takes too long to begin.

    Args:
        app: The application behind it.
        request_timeout_s: Longest time from a request's headers to the beginning of its answer.
    """

    def __init__(self, app: ASGIApp, request_timeout_s: float) -> None:
        self._app = app
        self._request_timeout_s = request_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self._request_timeout_s) as limit:

                async def send_in_time(message: Message) -> None:
                    limit.reschedule(None)  # how long the caller takes for it is another matter
                    await send(message)

                await self._app(scope, receive, send_in_time)
        except TimeoutError:
            if not limit.expired():
                raise  # somebody else's
            Metered.of(scope).outcome = "dropped"
            detail = f"no answer within {self._request_timeout_s:g} s (request_timeout_s)"
            await closing(503, detail, {"retry-after": "1"})(scope, receive, send)


@dataclass(slots=True)
class Metered:
    """What the meter cannot see in an answer's status.

    Attributes:
        outcome: ``busy`` or ``dropped``, set by the application.
    """

    outcome: Literal["busy", "dropped"] | None = None

    @classmethod
    def of(cls, scope: Scope) -> "Metered":
        """The note of a request, for the application to write on."""
        metered: Metered = scope.setdefault(_METERED, cls())
        return metered


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
        metered = Metered.of(scope)
        status: int | None = None

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        except Exception:
            status = status or 500  # what the server answers when the application fails
            raise
        finally:
            if metered.outcome is not None:
                self._telemetry.unscored(metered.outcome)
            elif status is not None:  # None: the client left before its request was complete
                self._telemetry.request(status, time.perf_counter() - started_s)


class EndsQuietly:
    """Answers 503 to a request that the server cancels, which it does when its time to stop is over.

    Args:
        app: The application behind it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def send_and_note(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        except asyncio.CancelledError:
            Metered.of(scope).outcome = "dropped"
            if not started:
                await closing(503, "the service stops")(scope, receive, send)


def closing(status: int, detail: str, headers: Mapping[str, str] = MappingProxyType({})) -> JSONResponse:
    """An answer after which the connection is closed: the rest of the request is not read."""
    return JSONResponse({"detail": detail}, status_code=status, headers={"connection": "close", **headers})
