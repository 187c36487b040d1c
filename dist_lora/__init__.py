"""LoRA fine-tuning of the Llama-3 herd on sharded GPUs: small, exact, and the same numbers everywhere."""

__version__ = "0.1.0"
