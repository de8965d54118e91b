"""The console's pages: each module has a ``router(sources)`` below ``/api``, and a script in ``static/pages``."""
