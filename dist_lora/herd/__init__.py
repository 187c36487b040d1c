"""The Llama-3 herd: the facts of each model, and how a name, a folder or a hub id becomes one."""
