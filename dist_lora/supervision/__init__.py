"""Ranks that are started, watched and ended."""
