"""Measurements; each checks its results before it reports a time."""
