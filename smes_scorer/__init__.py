"""The scoring service. A request's way: :mod:`~smes_scorer.app` → ``request`` → ``answer`` → ``served`` model."""
