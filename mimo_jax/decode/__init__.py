"""Drafting and verifying inside one compiled loop."""
