"""The rules at work: the one lock, and the few threads beside it."""
