"""One service by several processes: one loads versions, others answer from its memory, and one starts them all."""
