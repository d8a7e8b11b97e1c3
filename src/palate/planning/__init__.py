"""The cost of a run before it starts, and the methods that fit what a user has."""
