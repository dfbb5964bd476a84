"""Comparisons with the real NeMo 2.7.3, which runs in an environment of its own."""
