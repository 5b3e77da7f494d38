"""The trainer: plan -> loader -> losses -> loop -> checkpoints."""
