"""A simulated card and services that speak the real protocols: one simulation for demo, tests and benchmarks."""
