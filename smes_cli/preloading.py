"""The largest library of a start, mapped into the process while Python still imports others."""

import ctypes
import importlib.util
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def torch_preloaded() -> Iterator[None]:
    """Load torch's library in a thread while the block runs, so that ``import torch`` finds it there.

    Mapping and relocating its 400 MB takes a tenth of a start, and no Python runs in that. Where the library lies
    elsewhere or does not load, ``import torch`` does it, or says what is wrong.
    """
    thread = threading.Thread(target=_load, name="preload-torch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()  # a process must not end while a library initialises itself


def _load() -> None:
    found = importlib.util.find_spec("torch")  # imports nothing
    for folder in (found.submodule_search_locations or ()) if found else ():
        for library in Path(folder, "lib").glob("libtorch_cpu.*"):
            try:
                ctypes.CDLL(str(library))
            except OSError:
                return
