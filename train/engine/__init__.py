"""A run: its settings, steps, optimizer, checkpoints, memory."""
