"""Operations with faster implementations than PyTorch's own; each has a plain reference that says what it computes."""
