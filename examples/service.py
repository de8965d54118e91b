"""A service of one's own on SMES Online: events in, features in, scores out that get better while it runs.

pip install smes-online && smes redis &            # or any Redis or Valkey
python service.py redis://127.0.0.1:6379/0         # events on Redis Streams; with kafka://host:port behind, on Kafka
"""

import contextlib
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from smes_client import Events, Features, Scorer, ScorerUnavailable

SCHEMA = """
name: kiosk
tasks: [{name: click, window_s: 0.5}]
features: [{name: taste, source: user}, {name: topic, source: item}, {name: price, kind: numeric, source: item},
           {name: page}]
"""
REQUESTS, SHOWN, TOPICS, PORT = 240, 10, ["news", "sport", "music"], random.randrange(20_000, 30_000)
USERS = {f"user-{n}": random.choice(TOPICS) for n in range(100)}
ITEMS = {f"item-{n}": (random.choice(TOPICS), random.uniform(0, 10)) for n in range(40)}


def clicks(user: str, item: str) -> bool:
    topic, price = ITEMS[item]
    return random.random() < (0.8 if topic == USERS[user] else 0.1) - price / 100


def auc(rows: list[tuple[float, bool]]) -> float:
    pairs = [(p > n) + 0.5 * (p == n) for p, clicked in rows if clicked for n, other in rows if not other]
    return sum(pairs) / len(pairs)


def main(redis: str, log: str) -> None:
    name, folder = f"kiosk-{time.time_ns()}", Path(tempfile.mkdtemp())
    place = {"kind": "kafka", "kafka_bootstrap": log[8:]} if log.startswith("kafka://") else {"redis_url": redis}
    schema, scored = folder / "kiosk.yaml", []
    schema.write_text(SCHEMA)
    config = {"schema": "kiosk.yaml", "event_log": {**place, "namespace": name}, "scorer": {"port": PORT}}
    config |= {"feature_store": {"redis_url": redis, "namespace": name}, "trainer": {"snapshot_interval_s": 0.3}}
    config |= {"stream": {"batch": {"size": 64, "max_wait_s": 0.1}, "join": {"allowed_lateness_s": 0.1}}}
    (folder / "smes.yaml").write_text(json.dumps(config))
    with contextlib.ExitStack() as stack:
        for command in ("train", "serve"):
            smes = subprocess.Popen([sys.executable, "-Pm", "smes_cli", "-q", command], cwd=folder)
            stack.callback(smes.wait)
            stack.callback(smes.terminate)
        features = stack.enter_context(Features(schema, redis, namespace=name))
        features.put_users((user, {"taste": taste}) for user, taste in USERS.items())
        features.put_items((item, {"topic": topic, "price": price}) for item, (topic, price) in ITEMS.items())
        events = stack.enter_context(Events(schema, log, namespace=name))
        scorer = stack.enter_context(Scorer(f"http://127.0.0.1:{PORT}", schema))
        for page in range(REQUESTS):
            user, items = random.choice(list(USERS)), random.sample(list(ITEMS), SHOWN)
            try:
                answer = scorer.score(user, items, {"page": page % 3})
                served = {item: answer.served(n) for n, item in enumerate(answer.ranking)}
            except ScorerUnavailable:  # nothing is learned yet
                served = {}
            for item in items:  # an event holds what the store does not: the trainer looks up the rest
                shown = events.impression(user=user, item=item, features={"page": page % 3}, served=served.get(item))
                if clicked := clicks(user, item):
                    events.feedback(shown.impression_id, "click")
                scored.append((served[item]["scores"]["click"] if served else 0.5, clicked))
            time.sleep(0.01)
    quarters = [auc(scored[q * len(scored) // 4 : (q + 1) * len(scored) // 4]) for q in range(4)]
    print("AUC by quarter of the run:", *(f"{quarter:.4f}" for quarter in quarters))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[-1])
