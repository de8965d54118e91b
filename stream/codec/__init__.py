"""Wire forms of the events, and what a good event is."""
