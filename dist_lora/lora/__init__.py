"""The adapters: the layer, where they are attached, and the file that PEFT and vLLM load."""
