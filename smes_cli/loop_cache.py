"""Where Numba keeps the compiled loops, also on a file system that cannot be written to.

Numba writes what it compiles beside the modules, or into the user's cache, or to ``NUMBA_CACHE_DIR``. Where it can
write to none of them, it ends the import of a module with an error. A container with a read-only root is such a place.
"""

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from smes.errors import SmesError

_logger = logging.getLogger(__name__)
_VARIABLE = "NUMBA_CACHE_DIR"
_PACKAGE = Path(__file__).parent


@contextmanager
def loop_cache() -> Iterator[None]:
    """Let Numba find, in the block, a folder that it can write to.

    Where it has none, it gets a temporary one, with copies of the loops that lie in ``NUMBA_CACHE_DIR`` or beside the
    modules. Processes that are started in the block use the same one.

    Raises:
        SmesError: No folder for temporary files can be written to either.
    """
    named = os.environ.get(_VARIABLE)
    if _is_writable(Path(named)) if named else any(map(_is_writable, (_PACKAGE / "__pycache__", _users_cache()))):
        yield
        return
    where = f"{_VARIABLE} ({named})" if named else f"{_PACKAGE.parent} and the user's cache"
    try:
        folder = tempfile.mkdtemp(prefix="smes-loops-")  # of its user alone: what is in it is run
    except OSError as error:
        raise SmesError(
            f"compiled loops: {where} cannot be written to, nor can a folder for temporary files: {error.strerror}; "
            f"expected {_VARIABLE} to name a folder that can"
        ) from error
    try:
        os.environ[_VARIABLE] = folder  # before Numba is imported
        _copy_loops(named, Path(folder))
        _logger.warning("compiled loops: %s cannot be written to; they are kept in %s until the end", where, folder)
        yield
    finally:
        if named is None:
            os.environ.pop(_VARIABLE, None)
        else:
            os.environ[_VARIABLE] = named
        shutil.rmtree(folder, ignore_errors=True)


def _copy_loops(named: str | None, folder: Path) -> None:
    """Copy loops that were compiled before; what cannot be copied is compiled again."""
    from numba.core.caching import UserProvidedCacheLocator

    places = {}
    for index in _PACKAGE.parent.glob("*/**/__pycache__/*.nbi"):
        module = index.parent.with_name("module.py")
        places[index.parent] = folder / UserProvidedCacheLocator.get_suitable_cache_subpath(str(module))
    with suppress(OSError):
        for compiled, place in places.items():
            shutil.copytree(compiled, place, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.pyc"))
        if named and Path(named).is_dir():
            shutil.copytree(named, folder, dirs_exist_ok=True)


def _users_cache() -> Path:
    home = os.path.expanduser("~")  # noqa: PTH111 - Path's raises where the user has no name
    return Path(os.environ.get("XDG_CACHE_HOME") or Path(home, ".cache"), "numba")


def _is_writable(folder: Path) -> bool:
    """As Numba finds out: by writing a file."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True
