"""Measurements of one MoE layer beside its limits and its peers: ``python -m benchmarks``.

Everything that is timed is compared with a float32 reference first; what does not agree has no time.
"""
