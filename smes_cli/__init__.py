"""The smes command: reads the configuration and wires the processes."""
