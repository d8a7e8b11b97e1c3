"""Sampling by a server: a policy's versions are published to vLLM, which samples its completions."""
