"""The frozen base: Llama built on the meta device, and its weights streamed in row by row."""
