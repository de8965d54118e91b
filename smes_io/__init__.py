"""What trainer, scorer and simulators share at the edge of the system: configuration and schema files, Redis, clocks.

- :mod:`smes_io.yaml_file` reads YAML into frozen dataclasses and words every mistake in one line.
- :mod:`smes_io.schema_file` reads a schema file: features and tasks, and with :mod:`smes_io.log_spec` the files and
  columns of a log. ``schemas/`` holds the schema files that come with the package.
- :mod:`smes_io.redis_client` opens connections to Redis with bounded waits; :mod:`smes_io.redis_access` knows how a
  server or a cluster lets its clients in.
- :mod:`smes_io.secrets` reads secrets from their places and hides them in messages; :mod:`smes_io.tls` knows
  certificates.
- :mod:`smes_io.clock` gives the wall clock and the one retry loop.

Nothing here knows events, models or training, and nothing here imports ``simulators``: ``smes train`` and
``smes serve`` need this package only.
"""
