"""Optimizers of a training, by their name in the configuration, and averages of the parameters."""
