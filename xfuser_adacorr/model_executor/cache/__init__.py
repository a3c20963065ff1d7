"""Caches for transformers: state, decisions, correction, and descriptions of model families."""
