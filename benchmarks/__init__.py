"""Benchmarks: what is fast, by how much, on this machine. Nothing here asserts a time."""
