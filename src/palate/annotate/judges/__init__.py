"""Judges: language models that say which text is better, in plain words and within a spending limit."""
