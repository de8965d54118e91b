"""The installed wheel in a folder whose files have the names of our packages.

No process that the command starts has the working folder on its path, so somebody else's ``cli.py``, ``stream/`` or
``simulators.py`` there is never imported.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.e2e.reports import SYNTHETIC_TASKS, assert_documented
from tests.running import environment, read_json

ROOT = Path(__file__).resolve().parents[2]
CLASHES = (
    "cli.py",
    "scorer.py",
    "simulators.py",
    "smes_cli.py",
    "smes.py",
    "stream/__init__.py",
    "trainer/__init__.py",
    "feature_store/__init__.py",
)
OURS = (
    *("smes", "smes_io", "smes_scorer", "smes_client", "smes_cli"),
    *("stream", "feature_store", "trainer", "simulators", "smes_console"),
)
pytestmark = [pytest.mark.timeout(600), pytest.mark.xdist_group("wheel")]


def python(*arguments: str, cwd: Path) -> str:
    """Run Python without the variables that could lead it to this checkout; its standard output."""
    env = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    ended = subprocess.run(arguments, cwd=cwd, env=env, check=False, capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``bin`` folder of a fresh environment with the wheel; its dependencies are those of this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    venv.create(folder / "env", with_pip=False)
    pip = (sys.executable, "-P", "-m", "pip", "--disable-pip-version-check", "--quiet")
    wheel_options = ("--no-deps", "--no-build-isolation", "--no-index")
    python(*pip, "wheel", *wheel_options, "--wheel-dir", str(folder), str(ROOT), cwd=folder)
    [wheel] = folder.glob("smes_online-*.whl")
    env_python = folder / "env" / "bin" / "python"
    python(*pip, "--python", str(env_python), "install", "--no-deps", "--no-index", str(wheel), cwd=folder)
    [site_packages] = (folder / "env" / "lib").glob("python*/site-packages")
    # A plain path: Python reads no .pth file of that folder, and so not the one of the editable installation.
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    _share_compiled_loops(site_packages)
    return env_python.parent


def has_kafka() -> bool:
    """Whether tests of Kafka run here; under continuous integration they have to."""
    home = Path(os.environ.get("KAFKA_HOME", ROOT.parent / "shared" / "kafka"))
    runs = "KAFKA_BOOTSTRAP" in os.environ or ((home / "libs").is_dir() and shutil.which("java") is not None)
    return runs or "CI" in os.environ


def _share_compiled_loops(site_packages: Path) -> None:
    """Copy what numba has compiled of this checkout beside the same sources: to compile it again takes half a minute.

    Numba takes it where time and size of the source are those that it was compiled from, and else compiles. A fresh
    checkout is compiled first: other tests need that, too.
    """
    compiling = (
        "from smes_cli.compile_loops import compile_loops; from smes_cli.config import Config; "
        "compile_loops(Config(schema='synthetic'), Config(schema='synthetic').schema_file().schema)"
    )
    python(sys.executable, "-c", compiling, cwd=ROOT)
    for cache in {compiled.parent for package in OURS for compiled in (ROOT / package).rglob("*.nbi")}:
        installed = site_packages / cache.relative_to(ROOT)
        for source in cache.parent.glob("*.py"):
            shutil.copystat(source, installed.parent / source.name)
        for compiled in cache.glob("*.nb[ic]"):
            shutil.copy(compiled, installed)


@pytest.fixture
def clashing(tmp_path: Path) -> Path:
    """A folder of modules that carry our names and must not be imported."""
    folder = tmp_path / "elsewhere"
    for name in CLASHES:
        module = folder / name
        module.parent.mkdir(parents=True, exist_ok=True)
        module.write_text(f'raise AssertionError("{name} of the working folder was imported")\n')
    return folder


def test_the_packages_are_those_of_the_wheel(installed: Path, clashing: Path) -> None:
    code = "import smes, smes_cli, stream; print(smes.__file__, smes_cli.__file__, stream.__file__)"

    files = python(str(installed / "python"), "-P", "-c", code, cwd=clashing).split()

    assert len(files) == 3
    assert all(Path(file).is_relative_to(installed.parent) for file in files)


def test_help_runs_in_a_folder_of_clashing_names(installed: Path, clashing: Path) -> None:
    assert "Exit codes" in python(str(installed / "smes"), "--help", cwd=clashing)


def test_the_demo_runs_in_a_folder_of_clashing_names(installed: Path, clashing: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    smes = str(installed / "smes")

    output = python(smes, "demo", "--limit", "600", "--rate", "2000", "--report", str(report), cwd=clashing)

    assert "conservation: every event that was appended is accounted for" in output
    assert_documented(read_json(report), SYNTHETIC_TASKS)


def test_a_service_of_ones_own_gets_better_scores_while_it_runs(
    installed: Path, clashing: Path, redis_url: str, request: pytest.FixtureRequest
) -> None:
    """On Kafka where it is at hand; on Redis it is what `tests/docs/test_your_own_service.py` does step by step."""
    addresses = [redis_url]
    if has_kafka():
        addresses.append(f"kafka://{request.getfixturevalue('kafka_bootstrap')}")
    script = clashing / "service.py"
    shutil.copy(ROOT / "examples" / "service.py", script)

    output = python(str(installed / "python"), "-P", str(script), *addresses, cwd=clashing)

    first, *_, last = map(float, output.splitlines()[-1].rpartition(":")[2].split())
    assert last > first


def test_the_wheel_holds_nothing_but_our_packages(installed: Path) -> None:
    [site_packages] = (installed.parent / "lib").glob("python*/site-packages")
    names = {path.name for path in site_packages.iterdir()}

    others = {"dependencies.pth", "__pycache__"}
    assert {name for name in names if not name.endswith(".dist-info")} - others == {*OURS}


def test_without_p_a_clashing_module_is_imported(clashing: Path) -> None:
    """The reason for starting every process with -P."""
    without = subprocess.run(
        [sys.executable, "-c", "import cli"], cwd=clashing, env=dict(os.environ), capture_output=True, text=True
    )

    assert "cli.py of the working folder was imported" in without.stderr
