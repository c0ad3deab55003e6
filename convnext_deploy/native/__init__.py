"""The CPU engine: C++ sources, the file of packed weights, and its Python side."""
