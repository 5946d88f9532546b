"""Memorization tests and the Diffusion Classifier."""
