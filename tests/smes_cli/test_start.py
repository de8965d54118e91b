"""How a command starts: without torch unless it trains or scores, and with every compiled loop ready.

The import of torch takes longer than most other commands run.
"""

import json
import subprocess
import sys
from pathlib import Path

from simulators.synthetic import synthesize
from smes_cli.building import warm_up
from smes_cli.config import Config
from smes_io.schema_file import load_schema_file
from tests.running import environment, write_config

_WITHOUT_TORCH = """
import json, sys
from smes_cli.__main__ import run
config, commands = sys.argv[1], json.loads(sys.argv[2])
for expected, *arguments in commands:
    assert run(["-c", config, *arguments]) == expected, arguments
    assert "torch" not in sys.modules, arguments

# The imports of the demo's own process, and its work before the workers start.
import smes_cli.demo.demo
from smes_cli.compile_loops import compile_loops
from smes_cli.config import Config
from smes_io.schema_file import load_builtin
compile_loops(Config(), load_builtin("synthetic").schema)
assert "torch" not in sys.modules, "demo"
"""

_TRAIN_AND_SERVE = """
import gc, sys
from pathlib import Path
from smes_cli.collection import uncollected
from smes_cli.preloading import torch_preloaded
with torch_preloaded():
    pass
assert "torch" not in sys.modules and "libtorch_cpu" in Path("/proc/self/maps").read_text()
with uncollected():
    import smes_cli.config, smes_scorer.service
    assert not {"kafka", "pyarrow", "stream.example_stream"} & sys.modules.keys(), "the scorer reads no event log"
    import smes_cli.train
    assert "kafka" not in sys.modules, "the event log may be another one"
    assert not gc.isenabled()
assert gc.isenabled() and gc.get_freeze_count() > 100_000, gc.get_freeze_count()
simulators = {name for name in sys.modules if name.partition(".")[0] == "simulators"}
assert simulators <= {"simulators", "simulators.config"}, simulators
assert "duckdb" not in sys.modules

# A start with everything up to the first step and the first scores.
from smes_cli.building import warm_up
from smes_cli.config import Config
from smes_io.schema_file import load_builtin
warm_up(Config(), load_builtin("synthetic").schema)
assert not {"torch._dynamo", "torch._inductor", "sympy"} & sys.modules.keys()
"""

_COMPILED = """
import sys
from pathlib import Path
from numba.core.dispatcher import Dispatcher
from smes_cli.backtest import run_backtest
from smes_cli.compile_loops import compile_loops
from smes_cli.config import Config
from smes_io.schema_file import load_builtin

def compiled():
    modules = [m for name, m in sys.modules.items() if name.partition(".")[0] in ("smes", "stream")]
    loops = {f for module in modules for f in vars(module).values() if isinstance(f, Dispatcher)}
    return {f"{f.py_func.__module__}.{f.py_func.__name__}": f.signatures for f in loops}

config = Config(schema="synthetic")
compile_loops(config, load_builtin("synthetic").schema)
before = compiled()
assert sum(map(len, before.values())) > 8, before
log = Path(sys.argv[1])
result = run_backtest(config, log, limit=None, seed=0, baseline=None, should_stop=lambda: False)
assert result.report.events.trained == 600
after = compiled()
assert after == before, {name: types for name, types in after.items() if types != before.get(name)}
"""


def _python(script: str, *arguments: str, folder: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-P", "-c", script, *arguments], cwd=folder, env=environment(), capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr


def test_commands_that_touch_no_weights_import_no_torch(redis_url: str, namespace: str, tmp_path: Path) -> None:
    config = write_config(tmp_path, redis_url, namespace)
    log = str(tmp_path / "world.parquet")
    commands = [
        (0, "--help"),
        (0, "train", "--help"),
        (0, "init", str(tmp_path / "new.yaml")),
        (0, "synthesize", log, "--impressions", "300"),
        (0, "features", "load", log),
        (0, "replay", log),
        (1, "snapshots", "list"),  # none was published
    ]
    _python(_WITHOUT_TORCH, str(config), json.dumps(commands), folder=tmp_path)


def test_train_and_serve_import_no_simulator_and_no_compiler_of_torch(tmp_path: Path) -> None:
    _python(_TRAIN_AND_SERVE, folder=tmp_path)


def test_a_start_warms_up_what_derived_features_add(tmp_path: Path) -> None:
    schema = tmp_path / "derived.yaml"
    schema.write_text(
        "{name: derived, tasks: [{name: click, window_s: 5}], features: [{name: price, kind: numeric}, "
        "{name: cost, kind: numeric}], derive: ["
        "{name: band, kind: bucket, of: price, quantiles: 4}, {name: group, kind: hash, of: item_id, into: 9}, "
        "{name: twice, kind: ratio, of: [price, cost]}, {name: hour, kind: hour_of_day}]}"
    )
    warm_up(Config(schema=str(schema)), load_schema_file(schema).schema)


def test_training_compiles_nothing_after_the_start(tmp_path: Path) -> None:
    log = tmp_path / "world.parquet"
    synthesize(log, 600, seed=2)
    _python(_COMPILED, str(log), folder=tmp_path)
