"""Event sources: log replay, log readers, a synthetic world with known truth."""
