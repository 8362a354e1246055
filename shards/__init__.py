"""Data on disk: sources, packing, index, order, reading, decoding, verifying."""
