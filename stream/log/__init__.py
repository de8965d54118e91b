"""The event log: its seam and the adapters."""
