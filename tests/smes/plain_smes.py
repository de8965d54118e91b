"""A plain SMES for tests that are about something else: two stages, linear routers per task, on the encoder."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from smes.rankers.sparse.config import SmesConfig, smes_paper

PLAIN = smes_paper()
"""The base from which a test varies one thing."""


def changed(config: SmesConfig, changes: Mapping[str, Any]) -> SmesConfig:
    """A configuration with other values at some keys, which name nested ones by dots: ``{"experts.num": 8}``."""
    values = {key: value for key, value in changes.items() if "." not in key}
    parts: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        part, dot, name = key.partition(".")
        if dot:
            parts.setdefault(part, {})[name] = value
    nested = {part: replace(getattr(config, part), **inner) for part, inner in parts.items()}
    return replace(config, **values, **nested)


def plain(changes: Mapping[str, Any] | None = None) -> SmesConfig:
    """The plain form with other values at some keys, as in :func:`changed`."""
    return changed(PLAIN, changes or {})
