"""Quantized bases: what each format stores, and how weights are quantized and dequantized."""
