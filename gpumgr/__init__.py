"""gpumgr: one GPU, many programs, no out-of-memory."""

__version__ = "0.1.0"
