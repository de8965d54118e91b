"""A process that calls ``keep_freed_memory`` keeps freed memory; another one returns it to the system."""

import subprocess
import sys

import pytest

from smes.model.devices import keep_freed_memory

FAULTS = """
import resource, sys
import numpy as np
from smes.model.devices import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def step():
    held = [np.ones(1 << 20, np.float32) for _ in range(20)]  # 4 MB each, as activations are
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    """How many pages the system had to provide in the five steps after the first."""
    argv = [sys.executable, "-P", "-c", FAULTS, how]
    return int(subprocess.run(argv, capture_output=True, text=True, check=True).stdout)


def test_a_step_asks_the_system_for_its_memory_once() -> None:
    if not keep_freed_memory():
        pytest.skip("the C library is not glibc")
    kept, left = faults("keep"), faults("leave")
    assert 10 * kept < left, (kept, left)
