"""Scores with the exported model beside this file: JSON objects in, one a line, their scores out.

echo '{"user_id": 7, "item_id": 9}' | python score.py
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

from smes import ModelConfig, Schema, ServingModel
from smes.events import fill_elapsed
from smes.hashing import encode_id
from smes.schema import MISSING


def load(folder: Path) -> ServingModel:
    schema = Schema.from_dict(json.loads((folder / "schema.json").read_text()))
    model = ModelConfig.from_dict(json.loads((folder / "model.json").read_text()))
    return ServingModel.from_state(schema, model, load_file(folder / "model.safetensors"))


def score(model: ServingModel, rows: list[dict[str, Any]], now_ms: int) -> list[dict[str, float]]:
    """Score rows of feature → value: an id (text or integer), a list of ids, or a number; missing where left out."""
    schema = model.schema
    ids = np.full((len(rows), schema.id_width), MISSING, np.int64)
    numerics = np.full((len(rows), schema.num_numerics), np.nan, np.float32)
    for i, row in enumerate(rows):
        for name, columns in schema.id_slices.items():
            value = row.get(name)
            values = [] if value is None else value if isinstance(value, list) else [value]
            for column, each in zip(range(columns.start, columns.stop), values, strict=False):
                ids[i, column] = encode_id(each)
        for column, feature in enumerate(schema.numeric_features):
            numerics[i, column] = np.nan if row.get(feature.name) is None else row[feature.name]
    fill_elapsed(numerics, schema, now_ms)
    names = [task.name for task in schema.tasks]
    return [dict(zip(names, scores, strict=True)) for scores in model.score(ids, numerics, now_ms).tolist()]


if __name__ == "__main__":
    lines = [json.loads(line) for line in sys.stdin]
    for scores in score(load(Path(__file__).parent), lines, round(time.time() * 1000)):
        sys.stdout.write(json.dumps(scores) + "\n")
