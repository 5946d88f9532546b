"""Weights that depend on the time at which a network is called."""
