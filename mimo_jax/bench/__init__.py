"""Benchmarks: one module each; a table for people, one JSON object on the last line."""
