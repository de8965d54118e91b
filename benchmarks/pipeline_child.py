"""One backtest in a process of its own, by the code of whatever checkout stands first in ``PYTHONPATH``.

It prints one JSON object: seconds by the clock, seconds of the processor, and impressions trained on. Imports, the
compilation of loops and a short backtest come before the clock starts.

Run by :mod:`benchmarks.pipeline`: ``python -P pipeline_child.py LOG LIMIT``.
"""

import json
import sys
import time
from pathlib import Path

from smes_cli.backtest import run_backtest
from smes_cli.building import warm_up
from smes_cli.config import Config
from smes_cli.console import console

_SHORT = 2_000  # impressions


def main() -> None:
    """Time one backtest."""
    log, limit, config = Path(sys.argv[1]), int(sys.argv[2]), Config()
    console.quiet = True

    def backtest(impressions: int) -> int:
        result = run_backtest(config, log, limit=impressions, seed=0, baseline=None, should_stop=lambda: False)
        return result.report.events.trained

    warm_up(config, config.schema_file(log).schema)
    backtest(min(_SHORT, limit))
    clock_s, processor_s = time.perf_counter(), time.process_time()
    trained = backtest(limit)
    clock_s, processor_s = time.perf_counter() - clock_s, time.process_time() - processor_s
    print(json.dumps({"clock_s": clock_s, "processor_s": processor_s, "trained": trained}))


if __name__ == "__main__":
    main()
