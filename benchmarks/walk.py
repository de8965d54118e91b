"""How many files of ours one JSON event enters, from its append to the answer that it changes.

One impression and its feedback go as JSON into Redis Streams, through the trainer, and as a snapshot into the scorer's
answer over HTTP, all in this process. A file counts when one of its functions runs, compiled ones included. A first
event warms everything up and is not counted. The configuration is the default, but for one partition, one event that
moves the watermark, and mini-batches of one example. The parameter's count is of files that name ``num_group``.

Run: ``python -m benchmarks.walk [--files]``
"""

import argparse
import http.client
import json
import sys
import tempfile
import threading
import time
import tokenize
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from numba.core.dispatcher import Dispatcher

import smes
from feature_store.snapshots import SnapshotStore
from smes.schema import Schema
from smes_cli.building import build_evaluation, build_learner, warm_up
from smes_cli.config import Config, load_config
from smes_cli.demo.local_servers import start_valkey
from smes_io.clock import wall_clock_ms
from smes_scorer.app import SCORE_PATH, create_app
from stream.codec.codec import headers
from stream.dead_letters import DeadLetterWriter
from stream.example_stream import ExampleStream
from stream.log.event_log import EventLog, OutRecord
from stream.log.open_log import open_event_log
from stream.topics import FEEDBACK, IMPRESSIONS
from trainer.loop import Trainer
from trainer.publisher import Publisher
from trainer.schedule import Flags

ROOT = Path(smes.__file__).resolve().parents[1]
PACKAGES = ("smes", "smes_io", "stream", "feature_store", "trainer", "smes_scorer", "simulators", "smes_cli")
REQUEST = {"user_id": 7, "items": [9, 10], "context": {"tab": 1, "device": 2}}
FEATURES = {"tab": 1, "device": 2, "item_category": 3, "item_tags": [4, 5], "item_duration_s": 8.5}
_WAIT_S = 30.0
_REST_S = 0.5


class Recorder:
    """The files of ours whose functions run while :attr:`on` is true, in every thread started after it."""

    def __init__(self) -> None:
        self.on = False
        self._files: set[str] = set()
        self._known: dict[str, str | None] = {}
        threading.setprofile(self._profile)
        sys.setprofile(self._profile)

    def take(self) -> set[str]:
        """The files entered since the last call."""
        files, self._files = self._files, set()
        return files

    def follow_compiled(self) -> None:
        """Record calls of compiled functions too, which the interpreter does not report. Compile them before."""
        for module_name, module in list(sys.modules.items()):
            if module_name.partition(".")[0] in PACKAGES:
                for name, value in list(vars(module).items()):
                    if isinstance(value, Dispatcher):
                        setattr(module, name, self._recorded(value))

    def _recorded(self, compiled: Any) -> Any:
        files = [function.__code__.co_filename for function in _callees(compiled.py_func)]

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.on:
                for file in files:
                    self._enter(file)
            return compiled(*args, **kwargs)

        return call

    def _profile(self, frame: FrameType, event: str, argument: object) -> None:
        if self.on and event == "call" and frame.f_code.co_name != "<module>":
            self._enter(frame.f_code.co_filename)

    def _enter(self, file: str) -> None:
        if file not in self._known:
            path = Path(file).resolve()
            ours = path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in PACKAGES
            self._known[file] = str(path.relative_to(ROOT)) if ours else None
        name = self._known[file]
        if name is not None:
            self._files.add(name)


def _callees(function: Any) -> Iterator[Any]:
    """A compiled function and those that it calls, as Python functions."""
    yield function
    for name in function.__code__.co_names:
        value = function.__globals__.get(name)
        if isinstance(value, Dispatcher) and value.py_func is not function:
            yield from _callees(value.py_func)


class Walk:
    """A trainer and a scorer in this process, on a Valkey of their own."""

    def __init__(self, config: Config, stack: ExitStack) -> None:
        self.config, self.schema = config, config.schema_file().schema
        self.log = open_event_log(config.event_log)
        stack.callback(self.log.close)
        for topic in (IMPRESSIONS, FEEDBACK):
            self.log.ensure_topic(topic, config.event_log.partitions)
        self.trainer = _trainer(config, self.schema, self.log, stack)
        self.stream = self.trainer.stream
        self.port = stack.enter_context(_scorer(config, self.schema))

    def train(self, number: int) -> None:
        """Append an impression and its click, and a later event of each topic to move the watermark; train."""
        at_ms = wall_clock_ms() - 600_000 + 60_000 * number
        who = {"user_id": 7, "item_id": 9, "features": FEATURES}
        self._append(IMPRESSIONS, {"impression_id": number, "event_time_ms": at_ms, **who})
        self._append(FEEDBACK, {"impression_id": number, "event_time_ms": at_ms + 400, "task": "click", "value": 1})
        later = {"impression_id": 1000 + number, "event_time_ms": at_ms + 10_000}
        self._append(IMPRESSIONS, {**later, "user_id": 8, "item_id": 10})
        self._append(FEEDBACK, {**later, "task": "like", "value": 1})
        deadline_s = time.monotonic() + _WAIT_S
        while self.stream.upcoming() is None:
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"event {number} did not become a mini-batch within {_WAIT_S:g} s")
            self.stream.poll(0.2)
        while self.trainer.step():
            pass

    def publish_and_answer(self) -> dict[str, Any]:
        """Cut, publish, wait until the scorer serves that version, and ask it."""
        self.trainer.cut()
        step, deadline_s = self.trainer.learner.step_number, time.monotonic() + _WAIT_S
        while (answer := self.ask()) is None or answer["version"] != step:
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"version {step} was not served within {_WAIT_S:g} s")
            time.sleep(0.05)
        return answer

    def ask(self) -> dict[str, Any] | None:
        """The scorer's answer, None while it has no snapshot."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_WAIT_S)
        try:
            connection.request("POST", SCORE_PATH, json.dumps(REQUEST), {"content-type": "application/json"})
            response = connection.getresponse()
            body = response.read()
        finally:
            connection.close()
        if response.status == 503:
            return None
        if response.status != 200:
            raise RuntimeError(f"the scorer answered {response.status}: {body.decode()}")
        answer: dict[str, Any] = json.loads(body)
        return answer

    def _append(self, topic: str, event: dict[str, Any]) -> None:
        self.log.append(topic, [OutRecord(json.dumps(event).encode(), headers("json", self.schema), 0)])


def _trainer(config: Config, schema: Schema, log: EventLog, stack: ExitStack) -> Trainer:
    learner = build_learner(config, schema)
    stream = ExampleStream(schema, config.stream, log, DeadLetterWriter(log))
    trainer = Trainer(learner, stream, build_evaluation(config, learner), Flags(), lineage="a1b2c3d4")
    warm_up(config, schema)
    place = config.feature_store
    client = stack.enter_context(place.connect())
    store = SnapshotStore(client, place.namespace, place.snapshots)
    model = config.model.to_dict()
    trainer.publish_to(lambda name: Publisher(store, schema, model, name, now_ms=wall_clock_ms), store.current())
    stack.callback(trainer.finish)
    return trainer


@contextmanager
def _scorer(config: Config, schema: Schema) -> Iterator[int]:
    """Run the scorer in a thread of this process, on a free port, which is given."""
    store = config.feature_store
    app = create_app(
        config.scorer, schema, redis_url=store.redis_url, redis_access=store.redis_access, namespace=store.namespace
    )
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run, name="scorer")
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise RuntimeError("the scorer did not start: its error is above")
            time.sleep(0.02)
        port: int = server.servers[0].sockets[0].getsockname()[1]
        yield port
    finally:
        server.should_exit = True
        thread.join()


def configuration(redis_url: str) -> Config:
    """The default but for one partition, mini-batches of one, and no polling beside the notifications."""
    changes = {
        "SCHEMA": "synthetic",
        "EVENT_LOG__REDIS_URL": redis_url,
        "EVENT_LOG__PARTITIONS": "1",
        "FEATURE_STORE__REDIS_URL": redis_url,
        "STREAM__BATCH__SIZE": "1",
        "STREAM__JOIN__VOUCHERS": "1",  # one later event moves the watermark
        "TRAINER__DEVICE": "cpu",
        "TRAINER__THREADS": "1",
        "SCORER__POLL_S": "20",
        "SCORER__ENTITY_TIMEOUT_MS": "2000",
    }
    return load_config(None, {f"SMES_{name}": value for name, value in changes.items()})


def files_entered() -> tuple[set[str], set[str]]:
    """Files that an event enters from its append to the end of its step, and from the cut to the answer."""
    recorder = Recorder()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        server = stack.enter_context(start_valkey(Path(folder)))
        walk = Walk(configuration(server.url), stack)
        walk.train(1)
        walk.publish_and_answer()
        recorder.follow_compiled()
        walk.train(2)  # what runs on the second event only is warm, too
        walk.publish_and_answer()
        time.sleep(_REST_S)  # the publisher's thread tidies up after its publication
        recorder.on = True
        walk.train(3)
        trained = recorder.take()
        walk.publish_and_answer()
        recorder.on = False
        served = recorder.take()
    sys.setprofile(None)
    threading.setprofile(None)
    return trained, served


def files_that_name(parameter: str) -> set[str]:
    """Files of the packages in whose code, docstrings aside, a name stands."""
    found = set()
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            with path.open("rb") as file:
                if any(t.type == tokenize.NAME and t.string == parameter for t in tokenize.tokenize(file.readline)):
                    found.add(str(path.relative_to(ROOT)))
    return found


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", action="store_true", help="print the names of the files, too")
    arguments = parser.parse_args()
    trained, served = files_entered()
    walks = {
        "one event, from its append to the changed answer": trained | served,
        "  of these up to the end of its training step": trained,
        "one snapshot, from the cut to the answer": served,
        "one parameter, num_group: files that name it": files_that_name("num_group"),
    }
    for name, files in walks.items():
        print(f"{name}: {len(files)} files in {len({str(Path(f).parent) for f in files})} folders")
        if arguments.files:
            print("".join(f"    {file}\n" for file in sorted(files)), end="")


if __name__ == "__main__":
    main()
