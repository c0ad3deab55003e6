"""Labelled images and what is done to them before a model sees them."""
