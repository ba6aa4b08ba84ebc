"""Benchmarks: heads and whole models against what would be run instead, on this machine."""
