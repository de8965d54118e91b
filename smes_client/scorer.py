"""Asks a scoring service for scores, with and without asyncio, within a deadline.

An answer depends on nothing that a request changes, so a request may be sent again: where nobody listens, where the
connection breaks, and where the service is busy or not ready (503). Pauses grow from try to try, with a random part, so
that many callers do not come back together.
"""

import asyncio
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import msgspec

from smes.schema import Schema
from smes_client.answers import Answer, Sent, answer_of
from smes_client.checked import Id, id_of, plain_features
from smes_client.errors import ScorerRefused, ScorerUnavailable
from smes_client.schemas import load_schema
from stream.codec.validation import features_problem

_PATH = "/v1/score"
_RETRIABLE = (httpx.TransportError,)
_BUSY = (502, 503, 504)
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 2.0
_LONGEST_SHOWN = 500


class Scorer:
    """A client of a scoring service. Thread-safe; :meth:`ascore` is for one event loop.

    Args:
        url: Of the service, such as ``http://127.0.0.1:8000``.
        schema: The deployment's: a schema or its file. Requests are checked against it before they are sent.
        deadline_s: How long a call may take, with all its tries, seconds.
        timeout_s: Longest wait for one connection and for one answer, seconds.
        token: Bearer token, where the service wants one.
        verify: As httpx takes it: certificates for ``https``.
    """

    def __init__(
        self,
        url: str,
        schema: Schema | str | Path,
        *,
        deadline_s: float = 2.0,
        timeout_s: float = 1.0,
        token: str | None = None,
        verify: Any = True,
    ) -> None:
        for name, number in (("deadline_s", deadline_s), ("timeout_s", timeout_s)):
            if not number > 0:
                raise ValueError(f"{name}: {number}, expected more than 0")
        if not url.lower().startswith(("http://", "https://")):
            raise ValueError(f"url: {url!r}, expected http://HOST:PORT or https://HOST:PORT")
        self._schema, self._deadline_s, self._timeout_s = load_schema(schema), deadline_s, timeout_s
        self._context = {f.name: f for f in self._schema.features if f.source == "context"}
        self._url = url.rstrip("/") + _PATH
        headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {token}"} if token else {})
        self._options: dict[str, Any] = {"headers": headers, "verify": verify}
        self._client: httpx.Client | None = None
        self._async_client: httpx.AsyncClient | None = None

    def score(
        self,
        user: Id,
        items: Sequence[Id],
        context: Mapping[str, Any] | None = None,
        *,
        top_k: int | None = None,
        tasks: Sequence[str] | None = None,
    ) -> Answer:
        """Score and rank items for a user.

        Args:
            user: The user's id; a text becomes one by :func:`smes.hashing.encode_id`.
            items: Ids of the candidates, at least one.
            context: Name of a context feature → an id, a list of ids, or a number. What is left out is missing.
            top_k: Answer only so many items, the best ones; None: all.
            tasks: Answer only the scores of these tasks; None: of all. Items are ranked by all of them.

        Raises:
            ValueError: A field is not what the schema or the service wants; the message names it.
            ScorerUnavailable: No answer within ``deadline_s``.
            ScorerRefused: An answer that trying again does not mend, such as 401.
        """
        body, sent = self._body(user, items, context, top_k, tasks)
        tries = _Tries(self._deadline_s, self._timeout_s)
        if self._client is None:
            self._client = httpx.Client(**self._options)
        for timeout_s in tries:
            try:
                response = self._client.post(self._url, content=body, timeout=timeout_s)
            except _RETRIABLE as error:
                time.sleep(tries.pause_s(error))
                continue
            if (pause_s := tries.after(response)) is None:
                return _answer(response, sent)
            time.sleep(pause_s)
        raise tries.over(self._url)

    async def ascore(
        self,
        user: Id,
        items: Sequence[Id],
        context: Mapping[str, Any] | None = None,
        *,
        top_k: int | None = None,
        tasks: Sequence[str] | None = None,
    ) -> Answer:
        """As :meth:`score`, for asyncio."""
        body, sent = self._body(user, items, context, top_k, tasks)
        tries = _Tries(self._deadline_s, self._timeout_s)
        if self._async_client is None:
            self._async_client = httpx.AsyncClient(**self._options)
        for timeout_s in tries:
            try:
                response = await self._async_client.post(self._url, content=body, timeout=timeout_s)
            except _RETRIABLE as error:
                await asyncio.sleep(tries.pause_s(error))
                continue
            if (pause_s := tries.after(response)) is None:
                return _answer(response, sent)
            await asyncio.sleep(pause_s)
        raise tries.over(self._url)

    def close(self) -> None:
        """Close the connections of :meth:`score`; idempotent."""
        if self._client is not None:
            self._client.close()
            self._client = None

    async def aclose(self) -> None:
        """Close the connections of :meth:`ascore`; idempotent."""
        if self._async_client is not None:
            await self._async_client.aclose()
            self._async_client = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def _body(
        self,
        user: Id,
        items: Sequence[Id],
        context: Mapping[str, Any] | None,
        top_k: int | None,
        tasks: Sequence[str] | None,
    ) -> tuple[bytes, Sent]:
        """A request, and what is needed to read its answer."""
        if isinstance(items, str | bytes):  # a sequence, too, of what nobody means
            raise ValueError(f"items: {items!r:.60}, expected a list of ids")
        if len(items) == 0:
            raise ValueError("items: empty, expected at least one")
        ids = [id_of(i, f"items.{n}") for n, i in enumerate(items)]
        request: dict[str, Any] = {"user_id": id_of(user, "user"), "items": ids}
        if context:
            plain = plain_features(context, self._context, "context")
            if problem := features_problem(plain, self._schema, "context"):
                raise ValueError(problem.reason)
            request["context"] = plain
        if top_k is not None:
            request["top_k"] = _checked_count(top_k)
        if tasks is not None:
            request["tasks"] = self._checked_tasks(tasks)
        return msgspec.json.encode(request), Sent(items, ids, len(ids) if top_k is None else min(top_k, len(ids)))

    def _checked_tasks(self, tasks: Sequence[str]) -> list[str]:
        known = self._schema.task_index
        if isinstance(tasks, str) or not isinstance(tasks, Sequence) or len(tasks) == 0:
            raise ValueError(f"tasks: {tasks!r:.60}, expected a list of names of tasks, at least one")
        for n, name in enumerate(tasks):
            if not isinstance(name, str) or name not in known or name in tasks[:n]:
                raise ValueError(f"tasks.{n}: {name!r:.60}, expected each once of {', '.join(known)}")
        return list(tasks)


class _Tries:
    """The tries of one call: iterating gives the time that the next one may take, until the deadline."""

    def __init__(self, deadline_s: float, timeout_s: float) -> None:
        self._allowed_s, self._timeout_s = deadline_s, timeout_s
        self._until_s = time.monotonic() + deadline_s
        self._count = 0
        self._last: str = "no try"
        self._answer: str | None = None

    def __iter__(self) -> Iterator[float]:
        while (left_s := self._until_s - time.monotonic()) > 0:
            self._count += 1
            yield min(left_s, self._timeout_s)

    def after(self, response: httpx.Response) -> float | None:
        """How long to pause after an answer that may be another one later; None for one that may not."""
        if response.status_code not in _BUSY:
            return None
        wanted = response.headers.get("retry-after", "")
        self._last = self._answer = f"{response.status_code}: {response.text[:_LONGEST_SHOWN]}"
        return self._pause(float(wanted) if wanted.isdigit() else 0.0)

    def pause_s(self, error: Exception) -> float:
        """How long to pause after an error of the connection."""
        self._last = f"{type(error).__name__}: {error}"
        return self._pause(0.0)

    def over(self, url: str) -> ScorerUnavailable:
        """The error to raise when the deadline is over."""
        # The deadline may cut the last try short, which then tells nothing; an answer before it does.
        before = f"; the last answer: {self._answer}" if self._answer not in (None, self._last) else ""
        return ScorerUnavailable(
            f"{url}: no answer within {self._allowed_s:g} s, in {self._count} tries; the last: {self._last}{before}"
        )

    def _pause(self, wanted_s: float) -> float:
        grown_s: float = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** min(self._count - 1, 10))
        pause_s = grown_s * random.uniform(0.5, 1.0)  # noqa: S311 - spreads callers, guards nothing
        return min(max(pause_s, min(wanted_s, 4 * grown_s)), max(0.0, self._until_s - time.monotonic()))


def _checked_count(top_k: int) -> int:
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
        raise ValueError(f"top_k: {top_k!r:.60}, expected an integer from 1 on")
    return top_k


def _answer(response: httpx.Response, sent: Sent) -> Answer:
    if response.status_code == 200:
        return answer_of(response.content, sent)
    text = response.text[:_LONGEST_SHOWN]
    if response.status_code in (400, 413, 422):
        raise ValueError(f"scorer refused the request ({response.status_code}): {_told(response) or text}")
    raise ScorerRefused(f"{response.url}: {response.status_code}: {text}")


def _told(response: httpx.Response) -> str | None:
    """The field and the words of a 422."""
    try:
        first = msgspec.json.decode(response.content)["detail"][0]
        return f"{'.'.join(map(str, first['loc'][1:]))}: {first['msg']}"
    except (msgspec.MsgspecError, LookupError, TypeError):
        return None
