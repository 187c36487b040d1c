"""What a run will hold, send and take, before it is started: arithmetic, and the real step on pretend tensors."""
