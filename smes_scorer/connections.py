"""What one client may cost before its request reaches the application: a place, some bytes, and a while.

uvicorn closes a kept connection without a request after 5 s (``timeout_keep_alive``). It knows no limit on how long a
client may take to send its headers or to read its answer, and accepts any number of connections. The class made here
adds these to its protocol; only the callbacks of :class:`asyncio.Protocol` and ``cycle`` of uvicorn are used. How long
a body may take is the business of :class:`smes_scorer.middleware.BodyLimit`, which can say so to the client.
"""

import asyncio
from typing import TYPE_CHECKING, Any, ClassVar

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from smes_scorer.config import ScorerConfig
from smes_scorer.telemetry import Cut, Telemetry

if TYPE_CHECKING:  # both of uvicorn's protocols look the same from here
    from uvicorn.protocols.http.h11_impl import H11Protocol as _HttpProtocol
else:
    _HttpProtocol = object

MAX_HEAD_BYTES = 64 * 1024
"""Most bytes of a request's headers."""

_REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\nretry-after: 1\r\n"
    b"content-type: application/json\r\ncontent-length: 33\r\n\r\n"
    b'{"detail":"too many connections"}'
)


class Bounds(_HttpProtocol):
    """The limits, to be put in front of a protocol of uvicorn by :func:`bounded_protocol`."""

    bounds: ClassVar[ScorerConfig]
    telemetry: ClassVar[Telemetry]

    _headers_due: asyncio.TimerHandle | None = None
    _answer_due: asyncio.TimerHandle | None = None
    _head_bytes = 0

    def connection_made(self, transport: Any) -> None:
        """Refuse a connection too many; wait for the headers of any other."""
        super().connection_made(transport)
        if len(self.connections) > self.bounds.max_connections:
            self.telemetry.cut("limit")
            transport.write(_REFUSAL)
            transport.close()
            return
        # Without room in the buffer, pause_writing says that something is left that the client has not read yet.
        transport.set_write_buffer_limits(high=0)
        self._wait_for_headers(0)

    def data_received(self, data: bytes) -> None:
        """Once the headers are complete, nothing is due until the answer."""
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._wait_for_headers(len(data))
            return
        self._head_bytes = 0
        if self._headers_due is not None:
            self._headers_due.cancel()
            self._headers_due = None

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is due any more."""
        self._stop_timers()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client must read what was written before long."""
        super().pause_writing()
        if self._answer_due is None:
            self._answer_due = self.loop.call_later(self.bounds.send_timeout_s, self._cut, "unread")

    def resume_writing(self) -> None:
        """The client has read everything."""
        super().resume_writing()
        if self._answer_due is not None:
            self._answer_due.cancel()
            self._answer_due = None

    def _wait_for_headers(self, received: int) -> None:
        self._head_bytes += received
        if self._head_bytes > MAX_HEAD_BYTES:
            self._cut("headers")
        elif self._headers_due is None:
            self._headers_due = self.loop.call_later(self.bounds.header_timeout_s, self._cut, "headers")

    def _cut(self, reason: Cut) -> None:
        self._stop_timers()
        self.telemetry.cut(reason)
        self.transport.abort()

    def _stop_timers(self) -> None:
        for timer in (self._headers_due, self._answer_due):
            if timer is not None:
                timer.cancel()


def bounded_protocol(
    config: ScorerConfig, telemetry: Telemetry, base: type[asyncio.Protocol] = AutoHTTPProtocol
) -> type[asyncio.Protocol]:
    """uvicorn's protocol with a limit of connections, and of the time for headers and for reading an answer.

    Args:
        config: The limits.
        telemetry: Where connections that are cut are counted.
        base: The protocol of uvicorn, for h11 or for httptools; the default is the faster one that is installed.
    """
    return type("BoundedProtocol", (Bounds, base), {"bounds": config, "telemetry": telemetry})
