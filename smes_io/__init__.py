"""What several packages need of the outside world: the Redis client, clocks and retries, YAML and schema files."""
