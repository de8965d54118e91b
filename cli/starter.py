"""The commented starter configuration that ``smes init`` writes. A test holds it against the real defaults."""

from pathlib import Path

DEFAULT_FILE = Path("smes.yaml")
"""Where ``smes init`` writes it and the other commands look for it."""

STARTER = """\
# SMES Online: one file for every process. Every key is optional; what stands here is the default.
# An environment variable overrides a key: SMES_EVENT_LOG__KIND=kafka, SMES_SCORER__PORT=9000.

# The features and tasks: a schema file of yours, or a built-in one (kuairand, synthetic).
# `smes backtest` and `smes replay` can tell the built-in ones from the log.
schema: synthetic

event_log:
  kind: redis                                # redis (Redis Streams) or kafka
  redis_url: redis://127.0.0.1:6379/0
  kafka_bootstrap: 127.0.0.1:9092
  namespace: smes                            # deployments with different namespaces share a server
  partitions: 2                              # of each topic, when it is created

feature_store:                               # snapshots and entity features
  redis_url: redis://127.0.0.1:6379/0
  namespace: smes
  snapshots:
    retain_bytes: 536870912                  # the oldest snapshots go first
    min_retained: 2

stream:
  join:
    allowed_lateness_s: 1.0                  # how far out of order events may come; delays every example by as much
    remember_s: 600.0                        # how long ids are remembered after their example was emitted
  batch:
    size: 256
    max_age_s: 3600.0                        # event time; live traffic wants seconds, a fast replay hours
  events_per_read: 16384
  idle_after_s: 10.0                         # a partition without news for so long no longer holds the others back
  max_future_s: 300.0                        # an event later than its arrival by more than this is refused

model:
  ranker: smes                               # smes, or linear (the floor)
  embedding_dim: 16
  wide: true                                 # a linear part beside the ranker

optimizer:
  learning_rate: 0.001

trainer:
  device: auto                               # auto, cpu or cuda
  seed: 0
  snapshot_interval_s: 1.0
  checkpoint:
    directory: checkpoints                   # leave out to keep none: a restart then begins anew
    interval_s: 30.0
    keep: 2
  evaluation:
    window_s: null                           # event time scored by one frozen copy of the weights; null: a day, or
    window_examples: null                    # as long as the schema lets a user's history stand still

scorer:
  host: 127.0.0.1
  port: 8000
  fusion_weights: {}                         # task: weight; a task left out weighs 1 if binary, 0 if regression
  max_items: 1000
  max_body_bytes: 1048576

replay:
  speed: max                                 # event time per wall time; 1 is real time
  seed: 0
  codec: arrow                               # arrow or json
"""
