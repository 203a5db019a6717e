"""Parameters become text: the KV cache's decoding loop, sampling, streaming."""
