"""dist_lora beside PEFT, torchtune and TRL on this machine's CPU: one process per contestant and rank, one step each in turn."""
