"""The layers, weights and caches of a compressed network."""
