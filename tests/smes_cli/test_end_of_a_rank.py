"""How a process that is one of several ranks ends, and what it leaves behind for its launcher."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import typer

from smes.errors import EventLogError
from smes_cli.command_line import StopRequest
from smes_cli.config import Config
from smes_cli.ranks import RankPlace, as_rank

_OTHER = """
import sys
from pathlib import Path

import typer

from smes_cli.command_line import StopRequest
from smes_cli.config import Config
from smes_cli.ranks import RankPlace, as_rank

try:
    with as_rank(RankPlace(1, 2, 1, Path(sys.argv[1])), Config(), StopRequest()) as world:
        world.wait_for_all()
        world.wait_for_all()
except typer.Exit as ended:
    sys.exit(ended.exit_code)
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RankPlace:
    """This process is rank 0 of 2."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    told = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    return RankPlace(0, 2, 0, tmp_path)


def test_an_end_by_an_error_is_told_and_leaves_no_process_group(place: RankPlace, tmp_path: Path) -> None:
    """A gloo group that lives when the interpreter ends may abort the process, which the launcher starts again then."""
    torch.set_num_threads(1)
    place.ended(0)  # before the launcher has started it again

    def fails() -> None:
        with as_rank(place, Config(), StopRequest()) as world:
            world.wait_for_all()
            assert not place.others_ended
            raise EventLogError("the log is gone")

    arguments = [sys.executable, "-c", _OTHER, str(tmp_path)]
    with subprocess.Popen(arguments, env=os.environ | {"RANK": "1"}, stderr=subprocess.PIPE) as other:
        with pytest.raises(typer.Exit) as ended:
            fails()
        assert ended.value.exit_code == 0
        assert not dist.is_initialized()
        _, said = other.communicate(timeout=60)

    assert other.returncode == 0, said.decode()
    assert [path.read_text() for path in sorted(tmp_path.glob("ended-*"))] == ["1", "1"]
