"""Labeled tasks of fine-tuning: head, loss and metrics."""
