"""The process that loads versions for those that answer. It answers nobody."""

import logging
import signal
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from types import MappingProxyType

import redis
import torch

from feature_store.config import ChunksConfig
from feature_store.objects import Objects
from feature_store.signing import Signer, SigningConfig
from feature_store.snapshots import SnapshotStore, SnapshotWatcher
from smes.model.shared_rows import SharedTable
from smes.schema import Schema
from smes_io.redis_access import RedisAccess
from smes_io.redis_client import open_client
from smes_scorer.arms import ArmPlaces, LoadingArm, arm_series, open_arm
from smes_scorer.config import ScorerConfig
from smes_scorer.first_answers import FirstAnswers
from smes_scorer.hot_swap import HotSwap
from smes_scorer.loading import load_table_model
from smes_scorer.processes.board import LOADER, Board
from smes_scorer.processes.feed import Feed
from smes_scorer.processes.figures import Figures
from smes_scorer.processes.mailbox import FirstAnswered, Mailbox, Message, Status, Tell
from smes_scorer.settled import FrozenAfterFirst
from smes_scorer.telemetry import Telemetry

_TURN_S = 0.05
_logger = logging.getLogger(__name__)


class LoaderProcess:
    """Loads the versions of all models, and tells the workers of them.

    Args:
        config, schema, redis_url, redis_access, namespace, signing, chunks, renamed: As of
            :func:`smes_scorer.app.create_app`.
        board: Of all processes.
        boxes: Of the workers.
        box: Of this process.
        incarnation: How often the loader was started.
    """

    def __init__(
        self,
        config: ScorerConfig,
        schema: Schema,
        *,
        redis_url: str,
        redis_access: RedisAccess | None,
        namespace: str,
        signing: SigningConfig | None,
        chunks: ChunksConfig | None = None,
        renamed: Mapping[str, str] = MappingProxyType({}),
        board: Board,
        boxes: Sequence[Mailbox],
        box: Mailbox,
        incarnation: int,
    ) -> None:
        self._board, self._box = board, box
        self._renames: dict[str, dict[str, str]] = {schema.hash: dict(renamed)}
        self._stopping = threading.Event()
        self._closing = ExitStack()
        self.telemetry = Telemetry()
        self._first_answers = FirstAnswers()
        signing, chunks = signing or SigningConfig(), chunks or ChunksConfig()

        def connected(namespace: str) -> redis.Redis:
            client = open_client(redis_url, config.redis_timeout_s, access=redis_access, namespace=namespace)
            self._closing.callback(client.close)
            return client

        def feed(track: int) -> Feed:
            return Feed(track, board, boxes, incarnation, lambda schema_hash: self._renames.get(schema_hash, {}))

        client = connected(namespace)
        signer, objects = Signer.of(signing, namespace), Objects.of(chunks, namespace)
        store = SnapshotStore(client, namespace, signer=signer, objects=objects)
        store.damage.on_new = self.telemetry.refused.note
        self.telemetry.store_damage.set_function(lambda: store.damage.count)
        load = FrozenAfterFirst(partial(load_table_model, new_table=SharedTable))
        self._feeds = [feed(track) for track in range(board.tracks)]
        self._swap = HotSwap(
            store,
            SnapshotWatcher(client, namespace, config.poll_s),
            schema,
            load,
            self._first_answers,
            self.telemetry,
            poll_s=config.poll_s,
            on_schema=self._on_schema,
            versions=self._feeds[0],
        )
        places = ArmPlaces(connected, namespace, signing, chunks, self._on_schema)
        self._arms: list[LoadingArm] = [
            open_arm(config, name, schema, places, load, versions)[0]
            for name, versions in zip(config.arms, self._feeds[1:], strict=True)
        ]
        if self._arms:
            self.telemetry.registry.register(arm_series(self._arms))

    def run(self) -> int:
        """Load until SIGTERM; returns the exit code: 1 if a thread that loads has ended by itself."""
        torch.set_num_threads(1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started the service tells it to end
        signal.signal(signal.SIGTERM, lambda number, frame: self._stopping.set())
        self._swap.start()
        for arm in self._arms:
            arm.start()
        with self._closing:
            while not self._stopping.is_set():
                self._turn()
                if not self._swap.alive or not all(arm.alive for arm in self._arms):
                    _logger.error("a thread that loads versions has ended")
                    return 1
            for arm in self._arms:
                arm.stop()
            self._swap.stop()
        return 0

    def _turn(self) -> None:
        self._board.beat(LOADER)
        message = self._box.take(_TURN_S)
        while message is not None:
            self._take(message)
            message = self._box.take(0)
        for feed, status in zip(self._feeds, self._statuses(), strict=True):
            feed.say(status)

    def _take(self, message: Message) -> None:
        text = message.text
        if isinstance(text, FirstAnswered):
            arm = self._arms[text.track - 1] if text.track else None
            answers, telemetry = (arm.first_answers, arm.telemetry) if arm else (self._first_answers, self.telemetry)
            first = answers.answered((text.lineage, text.version), text.now_ms)
            if first is not None:
                telemetry.first_answer(first)
        elif isinstance(text, Tell):
            message.answer(Figures.of(self.telemetry, LOADER).to_bytes())
        message.close()

    def _statuses(self) -> list[Status]:
        arms = [Status(i, arm.problem, arm.telemetry.refused.summary(), arm.is_ready) for i, arm in self._numbered()]
        main = Status(0, self._swap.problem, self.telemetry.refused.summary(), self._swap.served is not None)
        return [main, *arms]

    def _numbered(self) -> list[tuple[int, LoadingArm]]:
        return list(enumerate(self._arms, start=1))

    def _on_schema(self, schema: Schema, renamed: Mapping[str, str]) -> None:
        self._renames[schema.hash] = dict(renamed)
