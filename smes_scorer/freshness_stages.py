"""What the stages of freshness are, in words."""

DEPENDS_ON = {
    "joined": ("event log → joined", "stream.join: wait, allowed_lateness_s, vouchers; stream.idle_after_s"),
    "batched": ("joined → batched", "stream.batch: size, max_wait_s"),
    "trained": ("batched → trained", "how fast the trainer is: trainer.device, trainer.threads"),
    "cut": ("trained → cut", "trainer.snapshot_interval_s"),
    "published": ("cut → published", "bytes of a delta: feature_store.snapshots.precision; Redis"),
    "in_service": ("published → in service", "how fast the scorer loads; scorer.poll_s where notices are lost"),
    "answered": ("in service → first answer", "how often scores are asked for"),
}
"""Stage → what it goes from and to, and what it depends on. The stages are those of the scorer
(:data:`smes_scorer.first_answers.STAGES`), in their order.
"""
