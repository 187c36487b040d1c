"""Held-out loss, exact match and generation."""
