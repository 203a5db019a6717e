"""Text becomes tokens, tokens become batches."""
