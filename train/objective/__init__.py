"""What the losses compare with, and the losses."""
