"""Modules that are part of a compressed model, and what HiSVD knows about each model family."""
