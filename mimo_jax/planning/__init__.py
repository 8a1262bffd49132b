"""What a model needs on a mesh, computed from its declarations before anything is allocated."""
