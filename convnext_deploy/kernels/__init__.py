"""Implementations of ConvNeXt's operations for one kind of hardware each: C++ for CPUs, Triton for NVIDIA GPUs."""
