"""A Prometheus that scrapes a real trainer and scorer and judges the real rules, two hundred times as fast."""

import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

from smes_cli.demo.processes import log_tail, spawn, stop
from tests.ops.expressions import OPS
from tests.running import until

_MS_OF_A_MINUTE = 300
_UNITS_MIN = {"m": 1, "h": 60, "d": 24 * 60}
_DURATION = re.compile(r"(?<=[\s\[])(\d+)([mhd])(?=[\s\]\n])")


def quicker(text: str) -> str:
    """The rules with shorter windows, ``for`` and ``offset``: so many milliseconds for a minute."""
    return _DURATION.sub(lambda found: f"{int(found[1]) * _UNITS_MIN[found[2]] * _MS_OF_A_MINUTE}ms", text)


class Prometheus:
    """Asks a running server."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http

    def get(self, path: str, **parameters: str) -> Any:
        """``data`` of an answer of the API."""
        answer = self._http.get(f"/api/v1/{path}", params=parameters)
        assert answer.status_code == 200, f"{parameters}: {answer.text}"
        return answer.json()["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series that an expression has now."""
        series = self.get("query", query=expression)["result"]
        assert isinstance(series, list)
        return series

    def firing(self) -> set[str]:
        """Names of the alerts that fire."""
        return {one["labels"]["alertname"] for one in self.get("alerts")["alerts"] if one["state"] == "firing"}


@contextmanager
def prometheus_for(folder: Path, targets: Mapping[str, str], token: Path) -> Iterator[Prometheus]:
    """The server with the repository's configuration, but other targets (job → host:port) and a token's file."""
    config = yaml.safe_load((OPS / "prometheus" / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "250ms", "scrape_timeout": "250ms", "evaluation_interval": "250ms"}
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    assert jobs.keys() == targets.keys()
    for name, job in jobs.items():
        job["static_configs"] = [{"targets": [targets[name]]}]
        job["authorization"] = {"credentials_file": str(token)}
    folder.mkdir()
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    (folder / "alerts.yml").write_text(quicker((OPS / "prometheus" / "alerts.yml").read_text()))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    log = folder / "prometheus.log"
    arguments = [f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
    process = spawn(["prometheus", *arguments, f"--web.listen-address={address}", "--log.level=warn"], log=log)
    with httpx.Client(base_url=f"http://{address}", timeout=10) as http:

        def is_ready() -> bool:
            assert process.poll() is None, log_tail(log, 40)
            try:
                return http.get("/-/ready").status_code == 200
            except httpx.TransportError:
                return False

        try:
            until(is_ready, "Prometheus")
            yield Prometheus(http)
        finally:
            stop(process)
