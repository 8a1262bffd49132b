"""The model: modules that hold parameters, and their forward passes on one device's shards."""
