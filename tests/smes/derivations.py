"""Random schemas with derived features, random events of them, and a naive computation of what the model reads."""

import math
from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np

from smes.arrays import F32, I64
from smes.schema import MISSING, Derived, Feature, Schema, Task

ZONES = ("UTC", "Europe/Berlin", "America/St_Johns", "Asia/Kolkata", "Africa/Casablanca", "Pacific/Apia")
NOW_S = 1_750_000_000
Value = int | float | list[int] | None


def random_schema(rng: np.random.Generator) -> Schema:
    """Features of every kind and source, and 1 to 8 derived features, some of them of others."""
    features = [
        Feature("plan", source="user"),
        Feature("tags", "bag", source="item", max_length=int(rng.integers(1, 4))),
        Feature("published_at", "numeric", source="item"),
        Feature("price", "numeric", source="item"),
        Feature("budget", "numeric", source="user", transform="log1p"),
        Feature("page"),
        Feature("words", "bag", max_length=2),
        Feature("battery", "numeric", indicator=False),
    ]
    kinds = {f.name: f.kind for f in features} | {"user_id": "id", "item_id": "id"}
    derived: list[Derived] = []
    for i in range(int(rng.integers(1, 9))):
        each = _random_derived(f"d{i}", kinds, rng)
        derived.append(each)
        bag = any(kinds[name] == "bag" for name in each.of)
        kinds[each.name] = "numeric" if each.kind in ("ratio", "age") else "bag" if bag else "id"
    rng.shuffle(derived)
    return Schema("derived", (Task("click"), Task("buy")), tuple(features), derived=tuple(derived))


def _random_derived(name: str, kinds: dict[str, Any], rng: np.random.Generator) -> Derived:
    def some(kind: str, count: int) -> tuple[str, ...]:
        return tuple(map(str, rng.choice([n for n, k in kinds.items() if k == kind], count, replace=False)))

    match rng.integers(8):
        case 0:
            boundaries = np.unique(rng.normal(size=3).round(1)).tolist()
            return Derived(name, "bucket", some("numeric", 1), boundaries=tuple(boundaries))
        case 1:
            return Derived(name, "bucket", some("numeric", 1), quantiles=int(rng.integers(2, 9)), settle=500)
        case 2:
            bag = some("bag", 1) if rng.random() < 0.5 else ()
            into = int(rng.integers(1, 100)) if rng.random() < 0.5 else None
            return Derived(name, "cross", (*some("id", int(rng.integers(2, 4 - len(bag)))), *bag), into=into)
        case 3:
            return Derived(name, "hash", some("bag" if rng.random() < 0.5 else "id", 1), into=int(rng.integers(1, 50)))
        case 4:
            return Derived(name, "ratio", some("numeric", 2), transform="log1p")
        case 5:
            return Derived(name, "hour_of_day", time_zone=str(rng.choice(ZONES)))
        case 6:
            return Derived(name, "day_of_week", time_zone=str(rng.choice(ZONES)))
        case _:
            return Derived(name, "age", ("published_at",), replaces=bool(rng.random() < 0.5))


def random_rows(schema: Schema, rows: int, rng: np.random.Generator) -> tuple[I64, F32, I64]:
    """Ids [N, W], numerics [N, F] and times [N] of events; a fifth of the values, but no user or item, is missing."""
    ids = rng.integers(0, 30, (rows, schema.id_width))
    numerics = rng.normal(size=(rows, schema.num_numerics)).round(2)
    numerics[rng.random(numerics.shape) < 0.1] = 0.0
    columns = [f.name for f in schema.numeric_features]
    numerics[:, columns.index("published_at")] = NOW_S - rng.integers(0, 10_000_000, rows)
    numerics[rng.random(numerics.shape) < 0.2] = np.nan
    for feature in schema.id_features[2:]:
        block = ids[:, schema.id_slices[feature.name]]
        if feature.kind == "id":
            block[rng.random(block.shape) < 0.2] = MISSING
        else:  # a bag fills its row from the left
            block[np.arange(feature.width) >= rng.integers(0, feature.width + 1, (rows, 1))] = MISSING
    time_ms = NOW_S * 1000 + rng.integers(0, 86_400_000 * 300, rows)
    return ids, numerics.astype(np.float32), time_ms


def values_of(schema: Schema, ids_W: I64, numerics_F: F32) -> dict[str, Value]:
    """Name of each feature of one row → its value; None where it is missing."""
    values: dict[str, Value] = {}
    for feature in schema.id_features:
        cells = [int(i) for i in ids_W[schema.id_slices[feature.name]] if i != MISSING]
        values[feature.name] = (cells if feature.is_list else cells[0]) if cells else None
    for feature, number in zip(schema.numeric_features, numerics_F.tolist(), strict=True):
        values[feature.name] = None if math.isnan(number) else number
    return values


def naive_inputs(schema: Schema, raw: dict[str, Value], time_ms: int, boundaries: dict[str, list[float]]) -> Any:
    """What the model reads of one row: name → value, computed by plain Python from the docs' sentences."""
    by_name, values = {d.name: d for d in schema.derived}, dict(raw)

    def value_of(name: str) -> Value:
        if name not in values:
            values[name] = _naive(by_name[name], [value_of(other) for other in by_name[name].of], time_ms, boundaries)
        return values[name]

    return {f.name: value_of(f.name) for f in schema.inputs.features}


def _naive(derived: Derived, inputs: list[Any], time_ms: int, boundaries: dict[str, list[float]]) -> Value:
    if derived.kind in ("hour_of_day", "day_of_week"):
        local = datetime.fromtimestamp(time_ms // 1000, ZoneInfo(derived.time_zone))
        return local.hour if derived.kind == "hour_of_day" else local.weekday()
    if None in inputs:
        return None
    if derived.kind == "bucket":
        limits = [float(np.float32(b)) for b in derived.boundaries] or boundaries[derived.name]
        return sum(inputs[0] >= limit for limit in limits) if limits else None
    if derived.kind == "age":
        return float(np.float32((time_ms / 1000 - inputs[0]) / 86_400))
    if derived.kind == "ratio":
        return float(np.float32(inputs[0] / inputs[1])) if inputs[1] else None
    many = next((len(value) for value in inputs if isinstance(value, list)), None)
    hashed = [
        _naive_hash([value[i] if isinstance(value, list) else value for value in inputs], derived.into)
        for i in range(1 if many is None else many)
    ]
    return hashed[0] if many is None else hashed


def _naive_hash(ids: list[int], into: int | None) -> int:
    """SplitMix64's next output for the xor of the hash so far and the next id, one id after the other."""
    state = 0
    for each in ids:
        z = ((state ^ each) + 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        state = z ^ (z >> 31)
    return state // 2 if into is None else state % into
