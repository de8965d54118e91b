"""The scoring service and its hot swap."""
