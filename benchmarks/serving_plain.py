"""What one writes in an afternoon: FastAPI, pydantic, one MGET of JSON and the model, a request at a time.

It answers what the scorer answers, from the same weights, and has none of its limits, versions and counters.
Run: ``python -m benchmarks.serving_plain REDIS_URL``; it prints its URL.
"""

import json
import socket
import sys
from typing import Any

import numpy as np
import redis
import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

from benchmarks.serving_world import ServingWorld
from smes.schema import MISSING

PREFIX = "plain:"


class Question(BaseModel):
    """A request."""

    user_id: int
    items: list[int]
    context: dict[str, int]


class Item(BaseModel):
    """One item of an answer."""

    item_id: int
    scores: dict[str, float]
    fused: float


class Reply(BaseModel):
    """An answer."""

    items: list[Item]
    ranking: list[int]


def fill(client: redis.Redis, world: ServingWorld, entity: str, count: int) -> None:
    """Write the features of entities, as JSON."""
    columns = {name: values.tolist() for name, values in world.stored(entity, np.arange(count)).items()}
    for start in range(0, count, 1000):
        ids = range(start, min(count, start + 1000))
        rows = {f"{PREFIX}{entity}:{i}": json.dumps({name: column[i] for name, column in columns.items()}) for i in ids}
        client.mset(rows)


def application(redis_url: str) -> FastAPI:
    """The service."""
    world = ServingWorld()
    model, schema, app = world.serving_model(), world.schema, FastAPI()
    client = redis.Redis.from_url(redis_url)
    tasks = [task.name for task in schema.tasks]
    columns = {name: columns.start for name, columns in schema.id_slices.items()}
    numbers = {feature.name: i for i, feature in enumerate(schema.numeric_features)}

    def write(row: dict[str, Any], ids: Any, numerics: Any) -> None:
        for name, value in row.items():
            if name in numbers:
                numerics[..., numbers[name]] = value
            else:
                ids[..., columns[name]] = value

    @app.post("/v1/score")
    def score(question: Question) -> Reply:
        keys = [f"{PREFIX}user:{question.user_id}", *(f"{PREFIX}item:{item}" for item in question.items)]
        user, *rows = (json.loads(value) if value else {} for value in client.mget(keys))
        ids = np.full((len(question.items), schema.id_width), MISSING, np.int64)
        numerics = np.full((len(question.items), schema.num_numerics), np.nan, np.float32)
        ids[:, 0], ids[:, 1] = question.user_id, question.items
        write(user, ids, numerics)
        write(question.context, ids, numerics)
        for n, row in enumerate(rows):
            write(row, ids[n], numerics[n])
        scores = model.score(ids, numerics)
        fused = scores.sum(axis=1)
        items = [
            Item(item_id=item, scores=dict(zip(tasks, of_item.tolist(), strict=True)), fused=float(total))
            for item, of_item, total in zip(question.items, scores, fused, strict=True)
        ]
        return Reply(items=items, ranking=[question.items[i] for i in np.argsort(-fused, kind="stable")])

    return app


def main() -> None:
    """Serve until a signal ends it."""
    torch.set_num_threads(1)
    app = application(sys.argv[1])
    with socket.create_server(("127.0.0.1", 0)) as listening:
        print(f"http://127.0.0.1:{listening.getsockname()[1]}", flush=True)
        uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False)).run(sockets=[listening])


if __name__ == "__main__":
    main()
