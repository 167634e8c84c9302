"""Benchmarks: serving and training, against floors and peers."""
