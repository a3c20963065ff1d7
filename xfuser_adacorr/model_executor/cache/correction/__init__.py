"""Corrections: what turns measured offsets into better values."""
