"""Benchmarks, one subject a script; each compares A and B in turn inside one run."""
