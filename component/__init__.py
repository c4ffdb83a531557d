"""Modules that live inside a model, and what HiSVD knows about each model family."""
