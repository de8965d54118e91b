"""The ``smes`` command: it reads the configuration and connects the parts of the system to processes."""
