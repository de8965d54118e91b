"""Rankers map an instance's features to a representation per task."""
