"""Supervised fine-tunes, each with its own form of attention supervision."""
