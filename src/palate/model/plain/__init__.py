"""The plain path: padded batches and transformers' `generate`, right for every causal model."""
