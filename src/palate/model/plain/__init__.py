"""The plain path: padded batches and transformers' `generate`, correct for every causal model."""
