"""The event log, wire codecs, the join and mini-batch assembly."""
