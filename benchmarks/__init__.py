"""Benchmarks, measured on one machine and repeatable on yours."""
