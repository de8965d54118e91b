"""How long a scorer takes to its first answer, and a trainer to its first step: real processes on a real Valkey.

A start counts from the moment the process is made. Snapshot and events are in Valkey already, compiled loops and
compiled modules are in their caches. The scorer is asked every few milliseconds, by a new connection each time, until
it answers. The trainer begins without a checkpoint; it tells of its first step itself, from
:mod:`benchmarks.startup_child`. Processor time is that of the process up to then: unlike the other, it hardly moves
where other work runs beside.
"""

import argparse
import http.client
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import yaml

from benchmarks.figures import save, show
from simulators.synthetic import synthesize
from smes_cli.command_line import StopRequest
from smes_cli.config import load_config
from smes_cli.demo.local_servers import free_ports, start_valkey
from smes_cli.demo.processes import log_tail, spawn, stop
from smes_cli.replay import run_replay

IMPRESSIONS, ITEMS = 2000, 50
_WITHIN_S, _POLL_S = 120.0, 0.005
_FIRST_STEP = "first step: "
_IMPORT = "import time; a = time.perf_counter(); import torch; print(time.perf_counter() - a, time.process_time())"


class StartFailed(RuntimeError):
    """A process ended, or did not come up in time."""


def config_of(folder: Path, redis_url: str, namespace: str, port: int) -> Path:
    """Write the configuration of one start: all defaults but addresses, folders and the lateness of a finite log.

    Args:
        folder: Of this start.
        redis_url: Of the events, which all starts share, and of the snapshots.
        namespace: Of the snapshots.
        port: Of the scorer.

    Returns:
        The file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = {
        "schema": "synthetic",
        "event_log": {"redis_url": redis_url, "namespace": "startup"},
        "feature_store": {"redis_url": redis_url, "namespace": namespace},
        "trainer": {"device": "cpu", "checkpoint": {"directory": str(folder / "checkpoints")}},
        "scorer": {"port": port},
        "replay": {"speed": "max"},
    }
    path = folder / "smes.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def first_step(config: Path) -> dict[str, float]:
    """Start a trainer; stop it after its first step.

    Returns:
        Seconds from its start, and of the processor, until then.

    Raises:
        StartFailed: It ended before.
    """
    log = config.parent / "trainer.log"
    with _started(log, "-m", "benchmarks.startup_child", "-c", str(config), "train") as (process, started_s):
        _until(lambda: _FIRST_STEP in _text(log), process, log)
        told = json.loads(_text(log).partition(_FIRST_STEP)[2].partition("\n")[0])
    return {"s": told["at_s"] - started_s, "cpu_s": told["cpu_s"]}


def first_answer(config: Path, port: int) -> dict[str, float]:
    """Start a scorer, and ask it until it answers; then stop it.

    Returns:
        Seconds from its start, and of the processor, until then.

    Raises:
        StartFailed: It ended before.
    """
    body = json.dumps({"user_id": 1, "items": list(range(ITEMS))})
    log = config.parent / "scorer.log"
    with _started(log, "-m", "smes_cli", "-c", str(config), "serve") as (process, started_s):
        _until(lambda: _answers(port, body), process, log)
        answered_s, times = time.time(), psutil.Process(process.pid).cpu_times()
    return {"s": answered_s - started_s, "cpu_s": times.user + times.system}


def import_of_torch() -> dict[str, float]:
    """Seconds that importing torch takes in a process of its own; of the processor, those of the interpreter, too."""
    printed = subprocess.run([sys.executable, "-P", "-c", _IMPORT], capture_output=True, text=True, check=True).stdout
    seconds, cpu_s = map(float, printed.split())
    return {"s": seconds, "cpu_s": cpu_s}


@contextmanager
def _started(log: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], float]]:
    started_s = time.time()
    process = spawn([sys.executable, *arguments], log=log)
    try:
        yield process, started_s
    finally:
        stop(process)


def _answers(port: int, body: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_WITHIN_S)
    try:
        connection.request("POST", "/v1/score", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read()
    except OSError:
        return False
    finally:
        connection.close()
    if answer.status not in (200, 503):
        raise StartFailed(f"the scorer answered with status {answer.status}: {text.decode()[:300]}")
    return answer.status == 200


def _until(condition: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline_s = time.monotonic() + _WITHIN_S
    while not condition():
        if process.poll() is not None:
            raise StartFailed(f"ended with status {process.returncode}:\n{log_tail(log, 20)}")
        if time.monotonic() > deadline_s:
            raise StartFailed(f"not within {_WITHIN_S:g} s:\n{log_tail(log, 20)}")
        time.sleep(_POLL_S)


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def run(folder: Path, repeats: int) -> dict[str, float]:
    """The medians over ``repeats`` starts of each kind, in turns, and the slowest of each."""
    log = folder / "world.parquet"
    synthesize(log, IMPRESSIONS, seed=0)
    with start_valkey(folder / "valkey") as valkey:
        (port,) = free_ports(1)
        served = config_of(folder / "served", valkey.url, "served", port)
        config = load_config(served, {})
        run_replay(config, log, limit=None, max_rejected=None, report=None, should_stop=StopRequest())
        first_step(served)  # stopped after a step, it publishes that one; and every cache is warm from here on
        first_answer(served, port)
        kinds: dict[str, list[dict[str, float]]] = {
            "torch_import": [],
            "scorer_first_answer": [],
            "trainer_first_step": [],
        }
        for number in range(repeats):
            kinds["torch_import"].append(import_of_torch())
            kinds["scorer_first_answer"].append(first_answer(served, port))
            fresh = config_of(folder / f"fresh{number}", valkey.url, f"fresh{number}", port)
            kinds["trainer_first_step"].append(first_step(fresh))
    figures: dict[str, float] = {"starts": repeats}
    for kind, starts in kinds.items():
        for unit in ("s", "cpu_s"):
            figures[f"{kind}_{unit}"] = statistics.median(start[unit] for start in starts)
        figures[f"{kind}_max_s"] = max(start["s"] for start in starts)
    return figures


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="starts of each kind, in turns")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="startup-") as folder:
        figures = run(Path(folder), arguments.repeats)
    show(figures)
    save(figures, arguments.json)


if __name__ == "__main__":
    main()
