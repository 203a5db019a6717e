"""Parallelism over devices and processes, and defaults that depend on the device."""
