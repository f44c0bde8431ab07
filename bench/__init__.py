"""Benchmarks, one script per subject. Each compares A with B, alternating within one run."""
