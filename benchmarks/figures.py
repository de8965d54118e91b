"""How benchmarks give their figures: printed, and as one flat JSON object."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def show(figures: Mapping[str, float]) -> None:
    """Print each figure on a line of its own."""
    for name, value in figures.items():
        print(f"{name:34} {value:18,.4f}")


def save(figures: Mapping[str, Any], path: Path | None) -> None:
    """Write the figures as JSON; with None, do nothing."""
    if path is not None:
        path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
