"""GPU kernels in Pallas (Mosaic GPU), each with a plain reference that is its meaning."""
