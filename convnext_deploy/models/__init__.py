"""The ConvNeXt module, its published variants, and the checkpoints it can be filled from."""
