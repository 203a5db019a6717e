"""Batches become better parameters."""
