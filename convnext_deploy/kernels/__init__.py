"""Implementations of ConvNeXt's operations for one kind of hardware each."""
