"""The demo: everything on one machine, with local servers and child processes."""
