"""Rankers: from an instance's features to a representation per task."""
