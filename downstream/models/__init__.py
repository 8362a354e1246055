"""Models with attention."""
