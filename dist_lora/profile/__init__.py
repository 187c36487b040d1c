"""Where the time of a training step goes: marks in the code, and the table that is made of them."""
