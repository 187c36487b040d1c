"""The settings of a run: what they are, and how they are read from a YAML file and from arguments."""
