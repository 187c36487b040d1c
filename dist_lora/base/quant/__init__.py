"""Quantized bases: what each format stores, and the way from weights to that and back."""
