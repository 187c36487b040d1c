"""Estimates the memory, communication and time of a run before it is started."""
