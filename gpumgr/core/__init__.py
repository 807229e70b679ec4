"""The rules: values and ``now`` in, decisions out. No clock, thread, I/O or log."""
