"""What serving reads from Redis: model snapshots and entity features."""
