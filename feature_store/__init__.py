"""What the serving side reads online, in Redis: model snapshots and entity features."""
