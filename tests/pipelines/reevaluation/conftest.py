"""Fixtures of the tests of re-evaluation."""

from model_lab import evaluated, lab, light, registered  # noqa: F401
