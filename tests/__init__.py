"""The tests.

A package, so that ``tests`` is this folder and not the package of that name that deepctr-torch's wheel installs.
"""
