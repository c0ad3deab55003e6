"""Scores of an artifact over labelled images, and the gate that compares two of them."""
