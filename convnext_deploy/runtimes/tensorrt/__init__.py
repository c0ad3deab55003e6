"""TensorRT and TensorRT-RTX: choosing, building and running an engine."""
