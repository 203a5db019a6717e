"""The cost of a run, computed before it starts: FLOPs, memory and collectives."""
