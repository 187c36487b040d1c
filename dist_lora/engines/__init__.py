"""How the base and the adapters are sharded over the ranks, one file per engine."""
