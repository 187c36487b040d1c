"""How the frozen linears are kept: as they are, or as codes and scales."""
