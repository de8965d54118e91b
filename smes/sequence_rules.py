"""How a schema's sequences and its history must fit together."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from smes.schema import Feature, History, Schema


def check_sequences(schema: "Schema") -> None:
    """Refuse sequences that do not fit what they query or accompany.

    Raises:
        ValueError: Feature, key and value are named.
    """
    features = {f.name: f for f in schema.features}
    for feature in features.values():
        if feature.query is not None:
            partner, what = features.get(feature.query), "query"
            fits = partner is not None and partner.kind == "id" and _shared(partner, feature)
            expected = "an id feature of the same vocabulary and dim"
        elif feature.accompanies is not None:
            partner, what = features.get(feature.accompanies), "accompanies"
            fits = partner is not None and partner.query is not None and _alike(partner, feature)
            expected = "a sequence with a query and the same max_length, dim and source"
        else:
            continue
        if not fits:
            named = feature.query or feature.accompanies
            raise ValueError(f"feature {feature.name!r}: {what} {named!r}, expected {expected}")


def _shared(query: "Feature", sequence: "Feature") -> bool:
    return query.vocabulary_name == sequence.vocabulary_name and query.dim == sequence.dim


def _alike(sequence: "Feature", companion: "Feature") -> bool:
    told = (companion.max_length, companion.dim, companion.source)
    return (sequence.max_length, sequence.dim, sequence.source) == told


def check_history(schema: "Schema", history: "History") -> None:
    """Refuse a history that does not fit the schema's sequences and tasks.

    Raises:
        ValueError: Key and value are named.
    """
    features = {f.name: f for f in schema.features}
    items, outcomes = features.get(history.items), features.get(history.outcomes)
    if items is None or items.query != "item_id" or items.source != "context":
        raise ValueError(f"history.items: {history.items!r}, expected a context sequence with query item_id")
    if outcomes is None or outcomes.accompanies != items.name:
        raise ValueError(f"history.outcomes: {history.outcomes!r}, expected a sequence that accompanies {items.name}")
    binary = {t.name for t in schema.tasks if t.kind == "binary"}
    for name in history.tasks:
        if name not in binary:
            raise ValueError(f"history.tasks: {name!r}, expected binary tasks, of {', '.join(sorted(binary))}")
        if history.tasks.count(name) > 1:
            raise ValueError(f"history.tasks: duplicate task {name!r}")
