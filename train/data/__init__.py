"""Which scenes each step takes, and how they are read and cropped."""
