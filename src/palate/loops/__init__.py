"""Loops that several methods share: fitting records, rounds, candidates, pairing."""
