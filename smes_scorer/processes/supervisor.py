"""``smes serve --workers N``: starts the process that loads and those that answer, and starts again what ends.

All are forked from this process, which has imported and compiled everything by then, has one thread of its own, and
does nothing afterwards: so what they have in common is in memory once. A worker has a listening socket of its own, on
the one port (``SO_REUSEPORT``); this process keeps all of them open, so that callers wait, and are not refused, while a
worker is started again. When this process ends, whatever way, the others do.
"""

import ctypes
import gc
import logging
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from types import FrameType, MappingProxyType

import torch

from feature_store.config import ChunksConfig
from feature_store.objects import Objects
from feature_store.signing import Signer, SigningConfig
from smes.errors import SmesError
from smes.model.devices import keep_freed_memory
from smes.model.shared_rows import compile_mapped_kernels
from smes.schema import Schema
from smes_io.bearer import Tokens
from smes_io.redis_access import RedisAccess
from smes_io.redis_client import connect
from smes_scorer.app import create_app
from smes_scorer.config import ScorerConfig, check_names
from smes_scorer.processes.board import LOADER, Board
from smes_scorer.processes.followed import followed
from smes_scorer.processes.follower import WorkerPlace
from smes_scorer.processes.loader import LoaderProcess
from smes_scorer.processes.mailbox import Mailbox
from smes_scorer.service import compile_answering, listen, run_server, url_of

_PR_SET_PDEATHSIG = 1
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)
_LOOK_S = 1.0
_STUCK_S = 30.0
"""A process that has not said for so long that it works is ended, and started again."""

_SHORT_LIFE_S, _FIRST_PAUSE_S, _LONGEST_PAUSE_S = 10.0, 0.1, 10.0
_BACKLOG = 2048
_logger = logging.getLogger(__name__)


def serve_by_processes(
    config: ScorerConfig,
    schema: Schema,
    *,
    redis_url: str,
    redis_access: RedisAccess | None = None,
    namespace: str = "smes",
    signing: SigningConfig | None = None,
    chunks: ChunksConfig | None = None,
    renamed: Mapping[str, str] = MappingProxyType({}),
    on_listening: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve by ``config.processes`` processes and one that loads, until SIGTERM or SIGINT.

    Arguments and errors as of :func:`smes_scorer.service.serve`; call it in the main thread of a process without other
    threads.

    Raises:
        ValueError: Also where the system is not Linux.
    """
    if not sys.platform.startswith("linux"):
        raise ValueError(f"scorer.processes: {config.processes} on {sys.platform}, expected 1, or Linux")
    check_names(config, schema)
    if config.tokens is not None:
        Tokens(config.tokens)
    Signer.of(signing or SigningConfig(), namespace)
    chunks = chunks or ChunksConfig()
    if chunks.url != "redis":
        # Elsewhere, as a library may start threads for it; and now, as the process that loads would fail for ever.
        with ProcessPoolExecutor(1, get_context("fork")) as elsewhere:
            elsewhere.submit(_check_objects, chunks, namespace).result()
    connect(redis_url, config.redis_timeout_s, access=redis_access, namespace=namespace).close()
    with ExitStack() as closing:
        sockets = [closing.enter_context(one) for one in _sockets(config)]
        torch.set_num_threads(1)  # a team of threads would not outlive a fork
        keep_freed_memory()
        compile_answering()
        compile_mapped_kernels()
        board = Board(config.processes, 1 + len(config.arms))
        boxes, loader_box = [Mailbox() for _ in sockets], Mailbox()

        def load() -> int:
            for one in sockets:
                one.close()
            return LoaderProcess(
                config,
                schema,
                redis_url=redis_url,
                redis_access=redis_access,
                namespace=namespace,
                signing=signing,
                chunks=chunks,
                renamed=renamed,
                board=board,
                boxes=boxes,
                box=loader_box,
                incarnation=board.incarnation(LOADER),
            ).run()

        def answer(worker: int) -> int:
            for other in sockets[:worker] + sockets[worker + 1 :]:
                other.close()
            torch.set_num_threads(config.torch_threads)
            place = WorkerPlace(worker, board.incarnation(worker), board, boxes, loader_box)
            app = create_app(
                config,
                schema,
                redis_url=redis_url,
                redis_access=redis_access,
                namespace=namespace,
                signing=signing,
                renamed=renamed,
                source=followed(place),
            )
            run_server(app, config, sockets[worker])
            return 0

        mains = {LOADER: load} | {worker: partial(answer, worker) for worker in range(config.processes)}
        supervisor = Supervisor(mains, board, config.shutdown_s, stop_accepting=closing.close)
        supervisor.run(on_started=lambda: on_listening(url_of(config.host, sockets[0])))


@dataclass
class _Child:
    """A process: its id, None where it has ended; and when it may begin."""

    pid: int | None = None
    began_s: float = 0.0
    starts_s: float = 0.0
    pause_s: float = _FIRST_PAUSE_S


class Supervisor:
    """Keeps processes running until a signal comes.

    Args:
        mains: What each process does, by its number; it returns the exit code.
        board: Where it is noted who lives.
        shutdown_s: Within this they end when they are told to; then they are killed.
        stop_accepting: Called before they are told to end.
    """

    def __init__(
        self,
        mains: Mapping[int, Callable[[], int]],
        board: Board,
        shutdown_s: float,
        stop_accepting: Callable[[], None] = lambda: None,
    ) -> None:
        self._mains, self._board, self._shutdown_s = dict(mains), board, shutdown_s
        self._stop_accepting = stop_accepting
        self._children = {number: _Child() for number in self._mains}
        self._stopping = False
        self._looked_s = 0.0

    def run(self, on_started: Callable[[], None] = lambda: None) -> None:
        """Start all, and start again what ends, until SIGTERM or SIGINT; then end all."""
        gc.collect()
        gc.freeze()  # the collector would write to every object, and so copy what processes have in common
        woken, wakes = socket.socketpair()
        for end in (woken, wakes):
            end.setblocking(False)
        before = [signal.signal(number, self._note) for number in _SIGNALS]
        wakeup = signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
        with woken, wakes:
            try:
                self._start_due()
                on_started()
                while not self._stopping:
                    select.select([woken], [], [], self._wait_s())
                    with suppress(BlockingIOError):
                        woken.recv(4096)
                    self._look()
                    if not self._stopping:
                        self._start_due()
            finally:
                signal.set_wakeup_fd(wakeup)
                self._end_all()
                for number, handler in zip(_SIGNALS, before, strict=True):
                    signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._stopping |= number != signal.SIGCHLD  # which says that it is time to look

    def _wait_s(self) -> float:
        due = [child.starts_s for child in self._children.values() if child.pid is None]
        return max(0.0, min([_LOOK_S, *(at - time.monotonic() for at in due)]))

    def _start_due(self) -> None:
        for number, child in self._children.items():
            if child.pid is None and time.monotonic() >= child.starts_s:
                self._board.born(number)
                child.began_s = time.monotonic()
                child.pid = _forked(self._mains[number], _name(number))

    def _look(self) -> None:
        """Note which processes have ended; end those that are stuck."""
        now_s = time.monotonic()
        asleep, self._looked_s = now_s - self._looked_s > 2 * _LOOK_S, now_s  # then the others may have been, too
        for number, child in self._children.items():
            if child.pid is None:
                continue
            status = _status(child.pid)
            if status is not None:
                self._board.died(number)
                if not self._stopping:
                    self._note_end(number, child, status)
                child.pid = None
            elif not asleep and self._board.silent_s(number) > _STUCK_S:
                _logger.warning("%s has not said for %g s that it works, and is ended", _name(number), _STUCK_S)
                os.kill(child.pid, signal.SIGKILL)

    def _note_end(self, number: int, child: _Child, status: int) -> None:
        now_s, code = time.monotonic(), os.waitstatus_to_exitcode(status)
        long = now_s - child.began_s > _SHORT_LIFE_S
        child.pause_s = _FIRST_PAUSE_S if long else min(2 * child.pause_s, _LONGEST_PAUSE_S)
        child.starts_s = now_s if long else now_s + child.pause_s
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
        _logger.warning("%s (process %d) ended %s; it is started again", _name(number), child.pid, how)

    def _end_all(self) -> None:
        self._stop_accepting()
        self._signal_all(signal.SIGTERM)
        until_s = time.monotonic() + self._shutdown_s
        while any(child.pid is not None for child in self._children.values()):
            for number, child in self._children.items():
                if child.pid is not None and _status(child.pid) is not None:
                    child.pid = None
                    self._board.died(number)
            if time.monotonic() > until_s:
                self._signal_all(signal.SIGKILL)
            time.sleep(0.01)

    def _signal_all(self, number: signal.Signals) -> None:
        for child in self._children.values():
            if child.pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(child.pid, number)


def _status(pid: int) -> int | None:
    """What :func:`os.waitpid` says of a child that has ended; None of one that runs."""
    ended, status = os.waitpid(pid, os.WNOHANG)
    return status if ended else None


def _forked(main: Callable[[], int], name: str) -> int:
    """Run ``main`` in a new process, which dies with this one. Returns its id."""
    parent = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    # A signal that comes while the child has this process's handlers would be noted there, and then forgotten.
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        return pid
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() == parent:
            code = main()
    except KeyboardInterrupt:
        code = 0
    except SmesError as error:
        _logger.error("%s: %s", name, error)
    except BaseException:
        _logger.exception("%s failed", name)
    finally:
        # Neither this process's stack nor what its parent registered for its end is this one's.
        with suppress(Exception):
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _sockets(config: ScorerConfig) -> list[socket.socket]:
    """Listening sockets on one port, one for each process that answers.

    Raises:
        SmesError: The address cannot be listened on.
    """
    probe = listen(config.host, config.port)  # without SO_REUSEPORT: another service on the port is an error
    family, address = probe.family, probe.getsockname()
    probe.close()
    sockets: list[socket.socket] = []
    try:
        for _ in range(config.processes):
            one = socket.socket(family, socket.SOCK_STREAM)
            sockets.append(one)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if family == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # as socket.create_server does
            one.bind(address)
            one.listen(_BACKLOG)
    except OSError as error:
        for one in sockets:
            one.close()
        raise SmesError(f"scorer: cannot listen on {config.host}:{address[1]}: {error.strerror or error}") from error
    return sockets


def _check_objects(chunks: ChunksConfig, namespace: str) -> None:
    Objects.of(chunks, namespace)


def _name(number: int) -> str:
    return "scorer: the process that loads" if number == LOADER else f"scorer: worker {number}"
