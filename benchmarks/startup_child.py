"""``smes``, which prints a line when its trainer has taken the first step: for :mod:`benchmarks.startup`.

The trainer's class is changed as its module is loaded, whenever that is, so that the start imports what it always does
in the order in which it always does.
"""

import importlib.util
import json
import sys
import time
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _Telling(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "trainer.loop":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        assert spec is not None, "the trainer is installed"
        loader: Any = spec.loader
        load = loader.exec_module

        def load_and_change(module: ModuleType) -> None:
            load(module)
            _tell_first_step(module.Trainer)

        loader.exec_module = load_and_change
        return spec


def _tell_first_step(trainer: Any) -> None:
    step = trainer.step

    def first_step(self: Any) -> bool:
        taken = bool(step(self))
        if taken:
            trainer.step = step
            told = {"at_s": time.time(), "cpu_s": time.process_time()}
            print("first step:", json.dumps(told), flush=True)
        return taken

    trainer.step = first_step


if __name__ == "__main__":
    sys.meta_path.insert(0, _Telling())
    from smes_cli.__main__ import main

    main()
