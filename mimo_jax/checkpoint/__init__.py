"""Checkpoints: reading, writing, verifying."""
