"""How devices share the work, and what depends on which devices they are."""
