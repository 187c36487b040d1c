"""From a config to a trained adapter: what is built, the loop, and what it writes down."""
