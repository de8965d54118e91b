"""Joined examples in the event log: one join writes them to a topic, and any number of trainers read them."""
