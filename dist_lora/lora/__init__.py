"""The adapters: their layer, where they are attached, and their file."""
