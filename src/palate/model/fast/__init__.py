"""The fast path: packed rows, shared prompts, and a head computed in tiles."""
