"""``smes demo``: the whole system on one machine.

:mod:`demo` runs the way from start to report. It starts :mod:`local_servers` (Valkey or Redis, Kafka) and, through
:mod:`workers`, ``smes train``, ``serve`` and ``replay``; :mod:`requests` asks the scorer for rankings meanwhile. All of
them are child processes of :mod:`processes`, which stop in bounded time and, by :mod:`bound_child`, die with the demo.
"""
