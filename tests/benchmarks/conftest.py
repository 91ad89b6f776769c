"""Puts this folder on the path: tests import benchmarks by name, as benchmarks import each other."""
