"""Accuracy against the eager network, and speed."""
