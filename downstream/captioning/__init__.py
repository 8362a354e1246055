"""Captioning with attention that object masks supervise (Kim et al., ICA loss)."""
