"""Held-out loss, exact match, tool calls and generation."""
