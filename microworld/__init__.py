"""A world in which identity and motion are known exactly, and the method trained and judged in it."""
