"""The commented starter configuration that ``smes init`` writes. Its values are the defaults."""

STARTER = """\
# SMES Online: one file for every process. Every key is optional. The values below are the defaults.
# An environment variable overrides a key: SMES_EVENT_LOG__KIND=kafka, SMES_SCORER__PORT=9000.

# The features and tasks: your own schema file, or a built-in one (kuairand, synthetic).
# `smes backtest` and `smes replay` recognize logs of the built-in schemas.
schema: synthetic

event_log:
  kind: redis                                # redis (Redis Streams) or kafka
  redis_url: redis://127.0.0.1:6379/0
  kafka_bootstrap: 127.0.0.1:9092
  namespace: smes                            # deployments with different namespaces can share a server
  partitions: 2                              # of each topic when it is created

feature_store:                               # snapshots and entity features
  redis_url: redis://127.0.0.1:6379/0
  namespace: smes
  snapshots:
    retain_bytes: 536870912                  # the oldest snapshots are removed first
    min_retained: 2

stream:
  join:
    allowed_lateness_s: 1.0                  # how far out of order events may arrive; delays every example
    remember_s: 600.0                        # how long the id of an emitted example is remembered
  batch:
    size: 256
    max_age_s: 3600.0                        # event time from the first example to the last
    max_wait_s: 0.5                          # then a batch is trained on however small; null: never, for replays
  events_per_read: 16384
  idle_after_s: 2.0                          # a partition without events for so long stops holding the others back
  max_future_s: 300.0                        # an event dated later than this after its arrival is refused

model:
  preset: default                            # default, paper or large: the values that the other keys change
  ranker: smes                               # smes, home, mmoe, ple, shared_bottom or linear
  embedding_dim: 16
  wide: true                                 # a linear part beside the ranker

optimizer:
  learning_rate: 0.002

trainer:
  device: auto                               # auto, cpu or cuda
  seed: 0
  snapshot_interval_s: 1.0
  checkpoint:
    directory: checkpoints                   # without it there are no checkpoints, and a restart begins anew
    interval_s: 30.0
    keep: 2
  evaluation:
    window_s: null                           # event time scored by one frozen copy; null: the history's, or a day
    window_examples: null                    # most examples in it; null: 16384, or 262144 with a history

scorer:
  host: 127.0.0.1
  port: 8000
  fusion_weights: {}                         # task: weight; default: 1 for a binary task, 0 for regression
  max_items: 1000
  max_body_bytes: 1048576

replay:
  speed: max                                 # event time per wall time; 1 is real time
  seed: 0
  codec: arrow                               # arrow or json
"""
