"""Where Numba can write nowhere, the compiled loops are copied, not compiled again, and nothing is left behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from smes.errors import SmesError
from smes_cli.loop_cache import loop_cache

_CODE = """
from smes_cli.loop_cache import loop_cache
with loop_cache():
    from smes.metric_kernels import compile_metric_kernels, count_scores
    compile_metric_kernels()
    print(dict(count_scores.stats.cache_hits), dict(count_scores.stats.cache_misses), count_scores.stats.cache_path)
"""


def test_loops_compiled_beside_the_modules_are_used(tmp_path: Path) -> None:
    environment = os.environ | {"NUMBA_CACHE_DIR": "/proc/none", "TMPDIR": str(tmp_path)}

    done = subprocess.run([sys.executable, "-P", "-c", _CODE], capture_output=True, text=True, env=environment)

    assert done.returncode == 0, done.stderr
    hits, misses, path = done.stdout.strip().rsplit(" ", 2)
    assert "1" in hits, done.stdout
    assert misses == "{}", done.stdout
    assert path.startswith(str(tmp_path))
    assert "compiled loops: NUMBA_CACHE_DIR (/proc/none) cannot be written to" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_where_nothing_can_be_written_the_error_says_what_to_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", "/proc/none")
    monkeypatch.setattr("tempfile.tempdir", "/proc/none")
    refused = r"NUMBA_CACHE_DIR \(/proc/none\) cannot be written to.*expected NUMBA_CACHE"
    with pytest.raises(SmesError, match=refused), loop_cache():
        raise AssertionError("not reached")
