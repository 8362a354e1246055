"""The mathematics of attention maps: normalising, warping, quantising, losses and metrics. Tensors in, tensors out."""
