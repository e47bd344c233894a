"""The same rounds across machines, on Flower."""
