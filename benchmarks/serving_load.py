"""A load on one HTTP address: so many connections, each with one request at a time, in one thread with epoll.

The requests are bytes made beforehand, and of an answer only the status line and the length are read. So it takes a few
percent of the processor that the service takes; ``processor_s`` says how much.
"""

import selectors
import socket
import time
from collections import deque
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray


@dataclass
class Answers:
    """What came back.

    Attributes:
        seconds: Of each answer 200: from when the request was due to the last byte.
        refused: Answers 503.
        failed: Any other answers.
        processor_s: Processor time of the load itself.
        took_s: From the first request to the last answer.
    """

    seconds: list[float] = field(default_factory=list)
    refused: int = 0
    failed: int = 0
    processor_s: float = 0.0
    took_s: float = 0.0

    @property
    def rate(self) -> float:
        """Answers 200 a second."""
        return len(self.seconds) / self.took_s

    def quantile_ms(self, share: float) -> float:
        """Of the answers 200; NaN without any."""
        times: NDArray[np.float64] = np.array(self.seconds)
        return 1000 * float(np.quantile(times, share)) if len(times) else float("nan")


class _Connection:
    def __init__(self, host: str, port: int) -> None:
        self.socket = socket.create_connection((host, port), timeout=60)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.due_s = 0.0
        self._got = bytearray()
        self._end = -1

    def ask(self, request: bytes, due_s: float) -> None:
        self.due_s, self._end = due_s, -1
        self._got.clear()
        self.socket.sendall(request)

    def received(self) -> int:
        """Read what is there; the status once the answer is complete, else 0."""
        piece = self.socket.recv(1 << 20)
        if not piece:
            raise ConnectionError("the service closed a connection")
        self._got += piece
        if self._end < 0 and (head := self._got.find(b"\r\n\r\n")) >= 0:
            lower = bytes(self._got[:head]).lower()
            at = lower.index(b"content-length:") + 15
            self._end = head + 4 + int(lower[at:].split(b"\r\n", 1)[0])
        return int(self._got[9:12]) if 0 <= self._end <= len(self._got) else 0


def load(url: str, bodies: list[bytes], connections: int, seconds: float, rate: float | None = None) -> Answers:
    """Ask for some seconds.

    Args:
        url: Base URL.
        bodies: JSON of the requests, in turns.
        connections: How many there are.
        seconds: How long; what is under way then is waited for.
        rate: Open loop: so many requests a second, due at even distances, whether or not answers come; a request for
            which no connection is free waits, and its time counts from when it was due. None: closed loop, each
            connection asks as soon as it is answered.
    """
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    requests = [
        b"POST /v1/score HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
        % (len(body), body)
        for body in bodies
    ]
    opened = [_Connection(parts.hostname, parts.port) for _ in range(connections)]
    answers, free = Answers(), deque(opened)
    asked = 0
    with selectors.DefaultSelector() as selector:
        for connection in opened:
            selector.register(connection.socket, selectors.EVENT_READ, connection)
        processor_s, begin_s = time.process_time(), time.perf_counter()
        now_s = begin_s
        while now_s < begin_s + seconds or len(free) < connections:
            while free and now_s < begin_s + seconds:
                due_s = now_s if rate is None else begin_s + asked / rate
                if due_s > now_s:
                    break
                free.popleft().ask(requests[asked % len(requests)], due_s)
                asked += 1
            waits_s = 0.05 if rate is None or not free else max(0.0, begin_s + asked / rate - now_s)
            for key, _ in selector.select(min(0.05, waits_s)):
                connection = key.data
                status = connection.received()
                if not status:
                    continue
                if status == 200:
                    answers.seconds.append(time.perf_counter() - connection.due_s)
                elif status == 503:
                    answers.refused += 1
                else:
                    answers.failed += 1
                free.append(connection)
            now_s = time.perf_counter()
        answers.processor_s, answers.took_s = time.process_time() - processor_s, now_s - begin_s
    for connection in opened:
        connection.socket.close()
    return answers
