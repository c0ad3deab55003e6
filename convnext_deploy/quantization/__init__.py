"""From what a model's tensors hold to the scales that they are quantized with."""
