"""Trials of benchmarks/faults.py: what is run, when it is struck, and how it is judged."""
