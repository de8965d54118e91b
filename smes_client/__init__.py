"""The client of a deployment: send events, store features, ask for scores. Light: no torch, no compiler.

>>> from smes_client import Events, Features, Scorer, load_schema  # doctest: +SKIP
>>> schema = load_schema("shop.yaml")  # doctest: +SKIP
>>> scorer = Scorer("http://127.0.0.1:8000", schema)  # doctest: +SKIP
>>> answer = scorer.score("c17", [3, 14, 15], {"page": 0})  # doctest: +SKIP
>>> with Events(schema, "redis://127.0.0.1:6379/0") as events:  # doctest: +SKIP
...     shown = events.impression(user="c17", item=answer.ranking[0], features={"page": 0}, served=answer.served(0))
...     events.feedback(shown.impression_id, "open")

What travels is written down to the byte in ``docs/reference/wire.md``. Each name below is loaded on first use, so that
a program that only asks for scores needs httpx, and one that only sends events needs kafka-python or redis.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from smes.hashing import encode_id
    from smes_client.answers import Answer, ScoredItem
    from smes_client.errors import BufferFull, DeliveryFailed, ScorerRefused, ScorerUnavailable
    from smes_client.events import Delivered, Events, Sent
    from smes_client.features import Features
    from smes_client.schemas import load_schema
    from smes_client.scorer import Scorer

__all__ = [
    "Answer",
    "BufferFull",
    "Delivered",
    "DeliveryFailed",
    "Events",
    "Features",
    "ScoredItem",
    "Scorer",
    "ScorerRefused",
    "ScorerUnavailable",
    "Sent",
    "encode_id",
    "load_schema",
]

_MODULES = {
    "smes.hashing": ("encode_id",),
    "smes_client.answers": ("Answer", "ScoredItem"),
    "smes_client.errors": ("BufferFull", "DeliveryFailed", "ScorerRefused", "ScorerUnavailable"),
    "smes_client.events": ("Delivered", "Events", "Sent"),
    "smes_client.features": ("Features",),
    "smes_client.schemas": ("load_schema",),
    "smes_client.scorer": ("Scorer",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    if name in _MODULE_OF:
        return getattr(import_module(_MODULE_OF[name]), name)
    raise AttributeError(f"module 'smes_client' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
