"""Data makers of self-rewarding: new prompts with their filters, and examples that teach a model to grade."""
