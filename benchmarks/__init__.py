"""Benchmarks: serving, training, photographs, and all of them on a GPU."""
