"""``python -m benchmarks``: every benchmark that needs no GPU, one after the other."""

import subprocess
import sys

BENCHMARKS = ("benchmarks.decode", "benchmarks.pipeline", "benchmarks.speed", "benchmarks.swaps")


def main() -> int:
    """Run each in a process of its own, so that none warms or fragments another's memory."""
    status = 0
    for name in BENCHMARKS:
        print(f"== {name}", flush=True)
        status |= subprocess.run([sys.executable, "-m", name], check=False).returncode
    return status


if __name__ == "__main__":
    sys.exit(main())
