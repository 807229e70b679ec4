"""The world: the only rooms with I/O."""
